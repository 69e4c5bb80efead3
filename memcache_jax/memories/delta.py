"""Delta rules: a token first erases what the memory recalls, then writes.

Within a chunk, what the tokens erase depends on each other through a unit lower triangular system
(the WY form of arXiv:2406.06484). Solved, it leaves a memory that only decays and adds.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from memcache_jax._typing import Array, Bool, Controls, Float
from memcache_jax.kernels.affine_update import AffineChunk
from memcache_jax.kernels.triangular import solve_unit_lower
from memcache_jax.memories.affine import MatrixState
from memcache_jax.memories.base import Run
from memcache_jax.memories.channel import ChannelChunk
from memcache_jax.memories.control import NEAR_ONE, Control
from memcache_jax.memories.matrix import DecayChunk, MatrixMemory, decay_chunk


class Correction(NamedTuple):
    """What tokens do to a memory: M_t = A_t + (writes_t - A_t erases_t) k_t^T.

    A_t = M_{t-1} diag(alpha_t) has decayed already. So what erases reads after the decay of its own
    token, and no decay is ever divided by.

    Attributes:
      log_alpha: logs of the decays, one per token or one per key channel of each.
      erases: the vectors that read what is erased.
      writes: what is written in its place.
    """

    log_alpha: Float[Array, "*m"] | Float[Array, "*m k"]
    erases: Float[Array, "*m k"]
    writes: Float[Array, "*m v"]


class DeltaMemory(MatrixMemory):
    """Memories whose tokens erase and write at one place, the key."""

    @abc.abstractmethod
    def correction(
        self, key: Float[Array, "*m k"], value: Float[Array, "*m v"], controls: Controls
    ) -> Correction:
        """What tokens do, of one token or of a chunk."""

    def step(self, state, anchor, key, value, controls) -> MatrixState:
        """Decays, erases what the memory recalls, and adds the token."""
        del anchor
        log_alpha, erases, writes = self.correction(key, value, controls)
        kept = jnp.exp(log_alpha).reshape(-1, 1) * state.matrix
        return MatrixState(kept + jnp.outer(key, writes - jnp.matmul(erases, kept)))

    def write(self, state, anchor, key, value, controls):
        """Solves for what a chunk's tokens really add, and adds it in one matrix product."""
        del anchor
        chunk, erases, writes = self._chunk(state, key, value, controls)
        recalled = jnp.matmul(chunk.decayed(erases), state.matrix)
        chunk = chunk.adding(solve_unit_lower(chunk.scores(erases)[0], writes - recalled))
        return MatrixState(chunk.end()), chunk

    def write_map(self, run, key, value, controls):
        """Writes with A beside M: A is what the rule makes of I where nothing is written."""
        state, transition = run
        chunk, erases, writes = self._chunk(state, key, value, controls)
        beside = jnp.concatenate([state.matrix, transition], axis=1)
        writes = jnp.pad(writes, ((0, 0), (0, transition.shape[1])))
        recalled = jnp.matmul(chunk.decayed(erases), beside)
        added = solve_unit_lower(chunk.scores(erases)[0], writes - recalled)
        end = chunk.adding(added)._replace(matrix=beside).end()
        matrix, transition = jnp.split(end, [value.shape[1]], axis=1)
        return Run(MatrixState(matrix), transition), chunk.adding(added[:, : value.shape[1]])

    def extended(self, transition, key, value, controls) -> Array:
        """A after a chunk, as in ``write_map``."""
        before = self.init({}, key.shape[-1], value.shape[-1], key.dtype)
        chunk, erases, _ = self._chunk(before, key, value, controls)
        recalled = jnp.matmul(chunk.decayed(erases), transition)
        added = solve_unit_lower(chunk.scores(erases)[0], -recalled)
        return chunk.adding(added)._replace(matrix=transition).end()

    def affine(self, before, key, value, query, controls) -> AffineChunk:
        """Solves for what a chunk's tokens add to nothing, and for what they recall."""
        chunk, erases, writes = self._chunk(before, key, value, controls)
        sides = jnp.concatenate([writes, chunk.decayed(erases)], axis=1)
        system, read = chunk.scores(erases, query)
        added, recalled = jnp.split(solve_unit_lower(system, sides), [value.shape[1]], axis=1)
        return chunk.adding(added).affine(query, read, recalled)

    def _chunk(
        self,
        state: MatrixState,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
    ) -> tuple[DecayChunk | ChannelChunk, Float[Array, "m k"], Float[Array, "m v"]]:
        """A chunk that erases nothing, what erases in it, and what is written.

        With e_t what token t really adds: e_t = writes_t - (decayed M_0) erases_t - sum over j < t
        of scores[t, j] e_j, the scores of erases_t with the keys.
        """
        log_alpha, erases, writes = self.correction(key, value, controls)
        if log_alpha.ndim == 1:
            return decay_chunk(state.matrix, log_alpha, key, writes), erases, writes
        return ChannelChunk(state.matrix, log_alpha, key[None], writes[None]), erases, writes


class _BetaMemory(DeltaMemory):
    """M_t = A_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T."""

    @property
    @abc.abstractmethod
    def controls(self) -> Mapping[str, Control]:
        """beta, and perhaps log_alpha."""

    def correction(self, key, value, controls) -> Correction:
        """A part beta of the error."""
        beta = controls["beta"]
        log_alpha = controls.get("log_alpha", jnp.zeros_like(beta)).astype(beta.dtype)
        return Correction(log_alpha, beta[..., None] * key, beta[..., None] * value)


@dataclasses.dataclass(frozen=True)
class DeltaNet(_BetaMemory):
    """DeltaNet: M_t = M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T (arXiv:2406.06484).

    Control: ``beta`` (b, t, h), in [0, 1] for keys of norm one.

    Example:
      >>> import memcache_jax as mc
      >>> sorted(mc.memories.DeltaNet().controls)
      ['beta']
    """

    on_chip: ClassVar[bool] = True
    takes_padding: ClassVar[bool] = True

    @property
    def controls(self) -> Mapping[str, Control]:
        """beta, how much of the error a token corrects."""
        return {"beta": Control()}

    def forgetting(self, controls: Controls, begins: Bool[Array, "m"]) -> Controls:
        """A decay to nothing where documents begin."""
        return {**controls, "log_alpha": jnp.where(begins, -jnp.inf, 0.0)}


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet(_BetaMemory):
    """Gated DeltaNet: M_t = alpha_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T.

    From arXiv:2412.06464. Controls, each (b, t, h): ``log_alpha`` (<= 0), and ``beta`` in [0, 1]
    for keys of norm one.

    Example:
      >>> import memcache_jax as mc
      >>> sorted(mc.memories.GatedDeltaNet().controls)
      ['beta', 'log_alpha']
    """

    on_chip: ClassVar[bool] = True
    takes_padding: ClassVar[bool] = True

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_alpha (decay, near 0), beta (how much of the error a token corrects)."""
        return {
            "log_alpha": NEAR_ONE,
            "beta": Control(),
        }


@dataclasses.dataclass(frozen=True)
class KDA(_BetaMemory):
    """Kimi delta attention: M_t = M_{t-1} diag(alpha_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T.

    From arXiv:2510.26692: gated DeltaNet with a decay per key channel. Controls: ``log_alpha``
    (b, t, h, k), <= 0, down to -inf; ``beta`` (b, t, h), in [0, 1] for keys of norm one.

    Example:
      >>> import memcache_jax as mc
      >>> mc.memories.KDA().controls["log_alpha"].axes
      'b t h k'
    """

    largest_chunk: ClassVar[int] = 32
    on_chip: ClassVar[bool] = True
    takes_padding: ClassVar[bool] = True

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_alpha (decays, near 0), beta (how much of the error a token corrects)."""
        return {
            "log_alpha": dataclasses.replace(NEAR_ONE, axes="b t h k"),
            "beta": Control(),
        }


@dataclasses.dataclass(frozen=True)
class GDN2(DeltaMemory):
    """Gated DeltaNet-2, which erases by key channel and writes by value channel.

    M_t = A_t - A_t (erase_t * k_t) k_t^T + (write_t * v_t) k_t^T, with A_t = M_{t-1} diag(alpha_t),
    from arXiv:2605.22791. Controls: ``log_alpha``, <= 0, down to -inf, and ``erase`` in [0, 1],
    both (b, t, h, k); ``write`` (b, t, h, v).

    Example:
      >>> import memcache_jax as mc
      >>> mc.memories.GDN2().controls["write"].axes
      'b t h v'
    """

    largest_chunk: ClassVar[int] = 32
    on_chip: ClassVar[bool] = True
    takes_padding: ClassVar[bool] = True

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_alpha (decays, near 0), erase and write (how much of each channel)."""
        return {
            "log_alpha": dataclasses.replace(NEAR_ONE, axes="b t h k"),
            "erase": Control("b t h k"),
            "write": Control("b t h v"),
        }

    def correction(self, key, value, controls) -> Correction:
        """A gate for each channel that erases or is written."""
        erases, writes = controls["erase"] * key, controls["write"] * value
        return Correction(controls["log_alpha"], erases, writes)
