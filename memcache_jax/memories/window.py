"""Sliding-window linear attention, which writes the token before once more."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from memcache_jax._typing import Array, Float
from memcache_jax.kernels.decay import decay_matrix, end_decay, start_decay
from memcache_jax.memories.base import Run
from memcache_jax.memories.control import NEAR_ONE, Control
from memcache_jax.memories.matrix import DecayChunk, MatrixMemory


class WindowState(NamedTuple):
    """The matrix of one head, and the token before."""

    matrix: Float[Array, "k v"]
    key: Float[Array, "k"]
    value: Float[Array, "v"]


class WindowTransition(NamedTuple):
    """What a run leaves of the matrix before it, and writes of the token before it.

    M' = diag(matrix) M + diag(crossing) v k^T, and M' adds nothing of v k^T once the run has a
    token of its own: ``empty`` is 1 until then.
    """

    matrix: Float[Array, "k"]
    crossing: Float[Array, "k"]
    empty: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class SWLA(MatrixMemory):
    """Sliding-window linear attention, window 2 (Eq. 28 of arXiv:2602.24281).

    M_t = alpha_t M_{t-1} + beta_t v_{t-1} k_{t-1}^T + lam_t v_t k_t^T, where an independent segment
    begins with v_{-1} k_{-1}^T = 0.

    It is Mamba-3's trapezoid too: with a step dt, a rate A and a share s, log_alpha = dt A,
    beta = (1 - s) dt alpha and lam = s dt. The rotation of that model is one of its keys and
    queries, before they come here.

    Controls, each (b, t, h): ``log_alpha`` (<= 0), ``beta`` and ``lam``.

    Example:
      >>> import memcache_jax as mc
      >>> sorted(mc.memories.SWLA().controls)
      ['beta', 'lam', 'log_alpha']
    """

    erases: ClassVar[bool] = False
    takes_padding: ClassVar[bool] = True

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_alpha (decay, near 0), beta (the token before), lam (the token)."""
        return {
            "log_alpha": NEAR_ONE,
            "beta": Control(forget=0.0),
            "lam": Control(),
        }

    def init(
        self, weights: Mapping[str, Array], key_dim: int, value_dim: int, dtype: Any
    ) -> WindowState:
        """Returns the zero matrix, and no token before."""
        matrix = super().init(weights, key_dim, value_dim, dtype).matrix
        return WindowState(matrix, jnp.zeros(key_dim, dtype), jnp.zeros(value_dim, dtype))

    def step(self, state, anchor, key, value, controls) -> WindowState:
        """Decays, and adds the outer products of the token before and of this one."""
        del anchor
        matrix = jnp.exp(controls["log_alpha"]) * state.matrix
        matrix += controls["beta"] * jnp.outer(state.key, state.value)
        return WindowState(matrix + controls["lam"] * jnp.outer(key, value), key, value)

    def write(self, state, anchor, key, value, controls) -> tuple[WindowState, DecayChunk]:
        """Adds a chunk in one matrix product, the token before it as a write of its own."""
        del anchor
        decay = decay_matrix(controls["log_alpha"])
        chunk = DecayChunk(
            matrix=state.matrix,
            decay=start_decay(controls["log_alpha"]),
            # A token is written with lam at its own time and with beta at the next one's.
            mixing=jnp.pad(decay * controls["lam"][None], ((0, 0), (1, 0)))
            + jnp.pad(decay * controls["beta"][None], ((0, 0), (0, 1))),
            key=jnp.concatenate([state.key[None], key]),
            value=jnp.concatenate([state.value[None], value]),
        )
        return WindowState(chunk.end(), key[-1], value[-1]), chunk

    def without_padding(self, state, key, value, count) -> WindowState:
        """The same matrix, and the last token before the zeros."""
        return state._replace(key=key[count - 1], value=value[count - 1])

    def carried(self, key: Float[Array, "m k"], value: Float[Array, "m v"]) -> WindowState:
        """A zero matrix and the last token."""
        zero = super().carried(key, value).matrix
        return WindowState(zero, key[-1], value[-1])

    def identity(self, key_dim: int, dtype: Any) -> WindowTransition:
        """All is left, and the first token is still to come."""
        one = jnp.ones((), dtype)
        return WindowTransition(jnp.ones(key_dim, dtype), jnp.zeros(key_dim, dtype), one)

    def extended(self, transition, key, value, controls) -> WindowTransition:
        """Decays both; a run's first token writes the one before."""
        del key, value
        decay = start_decay(controls["log_alpha"])[-1]
        crossing = controls["beta"][0] * end_decay(controls["log_alpha"])[0]
        matrix, crossed, empty = transition
        return WindowTransition(
            decay * matrix, decay * crossed + empty * crossing, jnp.zeros_like(empty)
        )

    def compose(self, first: Run, then: Run) -> Run:
        """M -> A2 (A1 M + B1) + B2, and what crosses from the first run's last token."""
        decay, crossing, empty = then.transition
        crossed = crossing[:, None] * jnp.outer(first.state.key, first.state.value)
        matrix = decay[:, None] * first.state.matrix + crossed + then.state.matrix
        transition = first.transition
        if transition is not None:
            transition = WindowTransition(
                decay * transition.matrix,
                decay * transition.crossing + transition.empty * crossing,
                transition.empty * empty,
            )
        return Run(then.state._replace(matrix=matrix), transition)
