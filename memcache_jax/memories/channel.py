"""Matrix memories whose key channels decay apart."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float
from memcache_jax.kernels.affine_update import AffineChunk
from memcache_jax.kernels.decay import channel_scores, end_decay, start_decay
from memcache_jax.memories.affine import MatrixState
from memcache_jax.memories.control import Control
from memcache_jax.memories.matrix import MatrixMemory


class ChannelChunk(NamedTuple):
    """A chunk of a memory whose key channels decay apart, with one or more writes per token.

    M_t = M diag(decay[t]) + sum over writes w and tokens j <= t of
    values[w, j] (keys[w, j] * (prod over j < i <= t of decays_i))^T.
    """

    matrix: Float[Array, "k v"]
    log_decay: Float[Array, "m k"]
    keys: Float[Array, "w m k"]
    values: Float[Array, "w m v"]

    def end(self) -> Float[Array, "k v"]:
        """The matrix after the last token."""
        keys = self.keys * end_decay(self.log_decay)[None]
        kept = start_decay(self.log_decay)[-1][:, None] * self.matrix
        return kept + jnp.einsum("wmk,wmv->kv", keys, self.values)

    def decayed(self, x: Float[Array, "m k"]) -> Float[Array, "m k"]:
        """What reads M as row t of x reads what is left of it in M_t."""
        return start_decay(self.log_decay) * x

    def scores(self, *xs: Float[Array, "m k"]) -> tuple[Float[Array, "m wm"], ...]:
        """How much of each value row t of each x reads in M_t."""
        return tuple(map(beside, channel_scores(jnp.stack(xs), self.keys, self.log_decay)))

    def adding(self, value: Float[Array, "m v"]) -> "ChannelChunk":
        """The same chunk, of one write per token, with other values."""
        return self._replace(values=value[None])

    def affine(
        self,
        x: Float[Array, "m k"],
        scores: Float[Array, "m wm"] | None = None,
        erase: Float[Array, "erasing k"] | None = None,
    ) -> AffineChunk:
        """The chunk as a map of a matrix, as ``DecayChunk`` has it."""
        decay = start_decay(self.log_decay)
        return AffineChunk(
            decay=decay[-1],
            value=self.values.reshape(-1, self.values.shape[-1]),
            key=(self.keys * end_decay(self.log_decay)[None]).reshape(-1, x.shape[-1]),
            query=decay * x,
            scores=self.scores(x)[0] if scores is None else scores,
            erase=erase,
        )

    def apply(self, x: Float[Array, "m k"]) -> Float[Array, "m v"]:
        """The product of M_t with row t of x."""
        old = jnp.matmul(self.decayed(x), self.matrix)
        return old + jnp.matmul(self.scores(x)[0], self.values.reshape(-1, self.values.shape[-1]))


def beside(scores: Float[Array, "w m m"]) -> Float[Array, "m wm"]:
    """Scores (w, m, m) of w writes per token, side by side."""
    return jnp.concatenate(list(scores), axis=1)


@dataclasses.dataclass(frozen=True)
class GLA(MatrixMemory):
    """Gated linear attention: M_t = M_{t-1} diag(alpha_t) + v_t k_t^T (arXiv:2312.06635).

    Control: ``log_alpha`` (b, t, h, k), <= 0, one decay per key channel.

    Example:
      >>> import memcache_jax as mc
      >>> mc.memories.GLA().controls["log_alpha"].axes
      'b t h k'
    """

    erases: ClassVar[bool] = False
    on_chip: ClassVar[bool] = True
    takes_padding: ClassVar[bool] = True
    largest_chunk: ClassVar[int] = 32

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_alpha, near 0: log sigmoid over 16, as in the paper."""
        return {
            "log_alpha": Control(
                "b t h k",
                activation=jax.nn.log_sigmoid,
                scale=1 / 16,
                bias=1.0,
                forget=-jnp.inf,
                most=0.0,
            )
        }

    def step(self, state, anchor, key, value, controls) -> MatrixState:
        """Decays each channel, and adds the outer product of one token."""
        del anchor
        kept = jnp.exp(controls["log_alpha"])[:, None] * state.matrix
        return MatrixState(kept + jnp.outer(key, value))

    def write(self, state, anchor, key, value, controls) -> tuple[MatrixState, ChannelChunk]:
        """Adds a chunk in one matrix product."""
        del anchor
        chunk = ChannelChunk(state.matrix, controls["log_alpha"], key[None], value[None])
        return MatrixState(chunk.end()), chunk
