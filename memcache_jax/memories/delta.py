"""Delta rules: a token first erases what its key recalls, then writes.

Within a chunk, what the tokens erase depends on each other through a unit lower triangular system
(the WY form of arXiv:2406.06484). Solved, it leaves a memory that only decays and adds.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Bool, Controls, Float
from memcache_jax.kernels.affine_update import AffineChunk
from memcache_jax.kernels.decay import channel_scores, decay_matrix, start_decay
from memcache_jax.kernels.triangular import solve_unit_lower
from memcache_jax.memories.affine import MatrixState
from memcache_jax.memories.base import NEAR_ONE, Control
from memcache_jax.memories.channel import ChannelChunk
from memcache_jax.memories.matrix import DecayChunk, MatrixMemory


class _DeltaMemory(MatrixMemory):
    """M_t = alpha_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T."""

    @property
    @abc.abstractmethod
    def controls(self) -> Mapping[str, Control]:
        """beta, and perhaps log_alpha."""

    def step(self, state, anchor, key, value, controls) -> MatrixState:
        """Decays, erases what the key recalls, and adds the token."""
        del anchor
        kept = jnp.exp(_log_alpha(controls)) * state.matrix
        error = value - jnp.matmul(key, kept)
        return MatrixState(kept + controls["beta"] * jnp.outer(key, error))

    def write(self, state, anchor, key, value, controls) -> tuple[MatrixState, DecayChunk]:
        """Solves for what a chunk's tokens really add, and adds it in one matrix product."""
        del anchor
        decay, mixing, system = self._system(key, controls)
        recalled = decay[:, None] * jnp.matmul(key, state.matrix)
        added = solve_unit_lower(system, controls["beta"][:, None] * (value - recalled))
        chunk = DecayChunk(state.matrix, decay, mixing, key, added)
        return MatrixState(chunk.end()), chunk

    def affine(self, before, key, value, query, controls) -> AffineChunk:
        """Solves for what a chunk's tokens add to nothing, and for what they recall."""
        decay, mixing, system = self._system(key, controls)
        sides = jnp.concatenate([value, decay[:, None] * key], axis=1)
        solved = solve_unit_lower(system, controls["beta"][:, None] * sides)
        added, recalled = jnp.split(solved, [value.shape[1]], axis=1)
        return DecayChunk(before.matrix, decay, mixing, key, added).affine(query, recalled)

    def _system(
        self, key: Float[Array, "m k"], controls: Controls
    ) -> tuple[Float[Array, "m"], Float[Array, "m m"], Float[Array, "m m"]]:
        """Decays since the start, decays between tokens, and the system of what tokens add.

        With e_t what token t adds: e_t = beta_t (v_t - decay_t M_0 k_t - sum over j < t of
        mixing[t, j] (k_t . k_j) e_j).
        """
        log_alpha, beta = _log_alpha(controls), controls["beta"]
        mixing = decay_matrix(log_alpha)
        overlap = jnp.tril(mixing * jnp.matmul(key, key.T), -1)
        return start_decay(log_alpha), mixing, beta[:, None] * overlap


def _log_alpha(controls: Controls) -> Array:
    """The decay's log; no decay where there is none."""
    beta = controls["beta"]
    return controls.get("log_alpha", jnp.zeros_like(beta)).astype(beta.dtype)


@dataclasses.dataclass(frozen=True)
class DeltaNet(_DeltaMemory):
    """DeltaNet: M_t = M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T (arXiv:2406.06484).

    Control: ``beta`` (b, t, h), in [0, 1] for keys of norm one.

    Example:
      >>> import memcache_jax as mc
      >>> sorted(mc.memories.DeltaNet().controls)
      ['beta']
    """

    @property
    def controls(self) -> Mapping[str, Control]:
        """beta, how much of the error a token corrects."""
        return {"beta": Control()}

    def forgetting(self, controls: Controls, begins: Bool[Array, "m"]) -> Controls:
        """A decay to nothing where documents begin."""
        return {**controls, "log_alpha": jnp.where(begins, -jnp.inf, 0.0)}


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet(_DeltaMemory):
    """Gated DeltaNet: M_t = alpha_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T.

    From arXiv:2412.06464. Controls, each (b, t, h): ``log_alpha`` (<= 0), and ``beta`` in [0, 1]
    for keys of norm one.

    Example:
      >>> import memcache_jax as mc
      >>> sorted(mc.memories.GatedDeltaNet().controls)
      ['beta', 'log_alpha']
    """

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_alpha (decay, near 0), beta (how much of the error a token corrects)."""
        return {
            "log_alpha": NEAR_ONE,
            "beta": Control(),
        }


def _unit(x: Float[Array, "... k"]) -> Float[Array, "... k"]:
    return x * jax.lax.rsqrt(jnp.vecdot(x, x) + 1e-6)[..., None]


@dataclasses.dataclass(frozen=True)
class RWKV7(MatrixMemory):
    """RWKV-7's generalised delta rule (arXiv:2503.14456).

    M_t = M_{t-1} (diag(w_t) - kappa_t (a_t * kappa_t)^T) + v_t k_t^T.

    Controls, each (b, t, h, k): ``log_w`` (<= 0), ``a`` in [0, 1], and ``kappa`` of norm one.

    Example:
      >>> import memcache_jax as mc
      >>> sorted(mc.memories.RWKV7().controls)
      ['a', 'kappa', 'log_w']
    """

    largest_chunk: ClassVar[int] = 32

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_w (decay, above -exp(-1/2)), a (how much is erased), kappa (where)."""
        return {
            "log_w": Control("b t h k", scale=-0.606531, bias=-3.0, forget=-jnp.inf, most=0.0),
            "a": Control("b t h k"),
            "kappa": Control("b t h k", activation=_unit, forget=0.0),
        }

    def step(self, state, anchor, key, value, controls) -> MatrixState:
        """Decays each channel, erases at kappa, and adds the token."""
        del anchor
        kappa = controls["kappa"]
        matrix = jnp.exp(controls["log_w"])[:, None] * state.matrix
        matrix -= jnp.outer(controls["a"] * kappa, jnp.matmul(kappa, state.matrix))
        return MatrixState(matrix + jnp.outer(key, value))

    def write(self, state, anchor, key, value, controls) -> tuple[MatrixState, ChannelChunk]:
        """Solves for what a chunk's tokens erase, a second write beside the tokens' own."""
        del anchor
        recall, to_written, system = self._system(key, controls)
        recalled = jnp.matmul(recall, state.matrix) + jnp.matmul(to_written, value)
        chunk = _erasing(state, key, value, solve_unit_lower(system, -recalled), controls)
        return MatrixState(chunk.end()), chunk

    def affine(self, before, key, value, query, controls) -> AffineChunk:
        """Solves for what a chunk's tokens erase of each other, and for what they recall."""
        recall, to_written, system = self._system(key, controls)
        solved = solve_unit_lower(
            system, jnp.concatenate([-jnp.matmul(to_written, value), recall], axis=1)
        )
        erased, recalled = jnp.split(solved, [value.shape[1]], axis=1)
        return _erasing(before, key, value, erased, controls).affine(query, recalled)

    def _system(
        self, key: Float[Array, "m k"], controls: Controls
    ) -> tuple[Float[Array, "m k"], Float[Array, "m m"], Float[Array, "m m"]]:
        """What a chunk's tokens recall of its start, and of its writes, and the erasures' system.

        Token t writes e_t = -M_{t-1} kappa_t at a_t * kappa_t, and M_{t-1} has the e_j before.
        """
        log_w, kappa = controls["log_w"], controls["kappa"]
        before = jnp.pad(start_decay(log_w)[:-1], ((1, 0), (0, 0)), constant_values=1.0)
        # What reads before token t reads after token t - 1.
        reads = jnp.pad(kappa[1:], ((0, 1), (0, 0)))
        written = jnp.stack([controls["a"] * kappa, key])
        scores = jax.vmap(channel_scores, in_axes=(None, 0, None))(reads, written, log_w)
        to_erased, to_written = jnp.pad(scores[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return kappa * before, to_written, to_erased


def _erasing(
    state: MatrixState,
    key: Float[Array, "m k"],
    value: Float[Array, "m v"],
    erased: Float[Array, "m v"],
    controls: Controls,
) -> ChannelChunk:
    """A chunk that erases beside what its tokens write."""
    keys = jnp.stack([controls["a"] * controls["kappa"], key])
    return ChannelChunk(state.matrix, controls["log_w"], keys, jnp.stack([erased, value]))
