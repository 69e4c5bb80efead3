"""RWKV-7's generalized delta rule, which erases at one place and writes at another."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Controls, Float
from memcache_jax.kernels.affine_update import AffineChunk
from memcache_jax.kernels.decay import channel_scores, start_decay
from memcache_jax.kernels.triangular import solve_unit_lower
from memcache_jax.memories.affine import MatrixState
from memcache_jax.memories.base import Run
from memcache_jax.memories.channel import ChannelChunk, beside
from memcache_jax.memories.control import Control
from memcache_jax.memories.matrix import MatrixMemory


def _unit(x: Float[Array, "... k"]) -> Float[Array, "... k"]:
    return x * jax.lax.rsqrt(jnp.vecdot(x, x) + 1e-6)[..., None]


@dataclasses.dataclass(frozen=True)
class RWKV7(MatrixMemory):
    """RWKV-7's generalized delta rule (arXiv:2503.14456).

    M_t = M_{t-1} (diag(w_t) - kappa_t (a_t * kappa_t)^T) + v_t k_t^T.

    Controls, each (b, t, h, k): ``log_w`` (<= 0), ``a`` in [0, 1], and ``kappa`` of norm one.

    Example:
      >>> import memcache_jax as mc
      >>> sorted(mc.memories.RWKV7().controls)
      ['a', 'kappa', 'log_w']
    """

    largest_chunk: ClassVar[int] = 32
    on_chip: ClassVar[bool] = True
    takes_padding: ClassVar[bool] = True

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
        recall, to_written, system, _ = self._system(key, controls)
        recalled = jnp.matmul(recall, state.matrix) + jnp.matmul(to_written, value)
        chunk = _erasing(state, key, value, solve_unit_lower(system, -recalled), controls)
        return MatrixState(chunk.end()), chunk

    def write_map(self, run, key, value, controls):
        """Writes with A beside M: A is what the rule makes of I where nothing is written."""
        state = MatrixState(jnp.concatenate([run.state.matrix, run.transition], axis=1))
        wide = jnp.pad(value, ((0, 0), (0, run.transition.shape[1])))
        end, chunk = self.write(state, state, key, wide, controls)
        matrix, transition = jnp.split(end.matrix, [value.shape[1]], axis=1)
        values = chunk.values[..., : value.shape[1]]
        return Run(MatrixState(matrix), transition), ChannelChunk(
            run.state.matrix, chunk.log_decay, chunk.keys, values
        )

    def extended(self, transition, key, value, controls) -> Array:
        """A after a chunk, as in ``write_map``."""
        state, nothing = MatrixState(transition), jnp.zeros((len(key), len(transition)), key.dtype)
        return self.write(state, state, key, nothing, controls)[0].matrix

    def affine(self, before, key, value, query, controls) -> AffineChunk:
        """Solves for what a chunk's tokens erase of each other, and for what they recall."""
        recall, to_written, system, (read,) = self._system(key, controls, query)
        solved = solve_unit_lower(
            system, jnp.concatenate([-jnp.matmul(to_written, value), recall], axis=1)
        )
        erased, recalled = jnp.split(solved, [value.shape[1]], axis=1)
        return _erasing(before, key, value, erased, controls).affine(query, read, recalled)

    def _system(
        self, key: Float[Array, "m k"], controls: Controls, *xs: Float[Array, "m k"]
    ) -> tuple[Float[Array, "m k"], Float[Array, "m m"], Float[Array, "m m"], tuple[Array, ...]]:
        """What a chunk's tokens recall of its start, and of its writes, and the erasures' system.

        Token t writes e_t = -M_{t-1} kappa_t at a_t * kappa_t, and M_{t-1} has the e_j before. Last
        come the scores of each x with all that is written.
        """
        log_w, kappa = controls["log_w"], controls["kappa"]
        before = jnp.concatenate([jnp.ones_like(log_w[:1]), start_decay(log_w)[:-1]])
        # What reads before token t reads after token t - 1.
        reads = jnp.concatenate([kappa[1:], jnp.zeros_like(kappa[:1])])
        writes = jnp.stack([controls["a"] * kappa, key])
        after_each, *scores = channel_scores(jnp.stack([reads, *xs]), writes, log_w)
        to_erased, to_written = (
            jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]) for x in after_each
        )
        return kappa * before, to_written, to_erased, tuple(map(beside, scores))


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
