"""Delta rules: a token first erases what its key recalls, then writes.

Within a chunk, what the tokens erase depends on each other through a unit lower triangular system
(the WY form of arXiv:2406.06484). Solved, it leaves a memory that only decays and adds.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from memcache_jax._typing import Array, Bool, Controls, Float
from memcache_jax.memories._decay import channel_scores, decay_matrix, start_decay
from memcache_jax.memories.base import NEAR_ONE, Control
from memcache_jax.memories.matrix import ChannelChunk, DecayChunk, MatrixMemory, MatrixState


class _DeltaMemory(MatrixMemory):
    """M_t = alpha_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T."""

    largest_chunk: ClassVar[int] = 64

    def step(
        self,
        state: MatrixState,
        anchor: MatrixState,
        key: Float[Array, "k"],
        value: Float[Array, "v"],
        controls: Controls,
    ) -> MatrixState:
        """Decays, erases what the key recalls, and adds the token."""
        del anchor
        kept = jnp.exp(_log_alpha(controls)) * state.matrix
        error = value - jnp.matmul(key, kept)
        return MatrixState(kept + controls["beta"] * jnp.outer(key, error))

    def write(
        self,
        state: MatrixState,
        anchor: MatrixState,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
    ) -> tuple[MatrixState, DecayChunk]:
        """Solves for what a chunk's tokens really add, and adds it in one matrix product."""
        del anchor
        log_alpha, beta = _log_alpha(controls), controls["beta"]
        decay = start_decay(log_alpha)
        mixing = decay_matrix(log_alpha)
        # With e_t what token t adds: e_t = beta_t (v_t - decay_t M_0 k_t - sum over j < t of
        # mixing[t, j] (k_t . k_j) e_j).
        overlap = jnp.tril(mixing * jnp.matmul(key, key.T), -1)
        recalled = decay[:, None] * jnp.matmul(key, state.matrix)
        added = solve_triangular(
            jnp.eye(len(beta), dtype=key.dtype) + beta[:, None] * overlap,
            beta[:, None] * (value - recalled),
            lower=True,
            unit_diagonal=True,
        )
        chunk = DecayChunk(state.matrix, decay, mixing, key, added)
        return MatrixState(chunk.end()), chunk


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

    largest_chunk: ClassVar[int] = 64

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_w (decay, above -exp(-1/2)), a (how much is erased), kappa (where)."""
        return {
            "log_w": Control("b t h k", scale=-0.606531, bias=-3.0, forget=-jnp.inf),
            "a": Control("b t h k"),
            "kappa": Control("b t h k", activation=_unit, forget=0.0),
        }

    def step(
        self,
        state: MatrixState,
        anchor: MatrixState,
        key: Float[Array, "k"],
        value: Float[Array, "v"],
        controls: Controls,
    ) -> MatrixState:
        """Decays each channel, erases at kappa, and adds the token."""
        del anchor
        kappa = controls["kappa"]
        matrix = jnp.exp(controls["log_w"])[:, None] * state.matrix
        matrix -= jnp.outer(controls["a"] * kappa, jnp.matmul(kappa, state.matrix))
        return MatrixState(matrix + jnp.outer(key, value))

    def write(
        self,
        state: MatrixState,
        anchor: MatrixState,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
    ) -> tuple[MatrixState, ChannelChunk]:
        """Solves for what a chunk's tokens erase, a second write beside the tokens' own."""
        del anchor
        log_w, kappa = controls["log_w"], controls["kappa"]
        erase = controls["a"] * kappa
        # Token t writes e_t = -M_{t-1} kappa_t at a_t * kappa_t, and M_{t-1} has the e_j before.
        size = key.shape[0]
        before = jnp.pad(start_decay(log_w)[:-1], ((1, 0), (0, 0)), constant_values=1.0)
        to_erased = channel_scores(kappa, erase, log_w, before=True)
        to_written = channel_scores(kappa, key, log_w, before=True)
        recalled = jnp.matmul(kappa * before, state.matrix) + jnp.matmul(to_written, value)
        erased = solve_triangular(
            jnp.eye(size, dtype=key.dtype) + to_erased, -recalled, lower=True, unit_diagonal=True
        )
        keys, values = jnp.stack([erase, key]), jnp.stack([erased, value])
        chunk = ChannelChunk(state.matrix, log_w, keys, values)
        return MatrixState(chunk.end()), chunk
