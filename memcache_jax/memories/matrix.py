"""Matrix memories that decay and add: a state M that is read by one product, kept as M^T (k, v)."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Bool, Controls, Float
from memcache_jax.kernels.affine_update import AffineChunk
from memcache_jax.kernels.decay import decay_matrix, start_decay
from memcache_jax.memories.affine import AffineMemory, MatrixState
from memcache_jax.memories.control import NEAR_ONE, Control


class MatrixMemory(AffineMemory):
    """Affine memories whose chunks, as ``write`` returns them, know their reads and their maps."""

    def apply(self, chunk: Any, layer: int, x: Float[Array, "m k"]) -> Array:
        """The product of M_t with row t of x."""
        del layer
        return chunk.apply(x)

    def affine(self, before, key, value, query, controls) -> AffineChunk:
        """What the chunk writes to a zero matrix."""
        return self.write(before, before, key, value, controls)[1].affine(query)


class DecayChunk(NamedTuple):
    """A chunk of a memory that decays as a whole, from which M at each of its tokens follows.

    M_t = decay[t] M + sum over the writes j of mixing[t, j] values[j] keys[j]^T.
    """

    matrix: Float[Array, "k v"]
    decay: Float[Array, "m"]
    mixing: Float[Array, "m writes"]
    key: Float[Array, "writes k"]
    value: Float[Array, "writes v"]

    def end(self) -> Float[Array, "k v"]:
        """The matrix after the last token."""
        written = jnp.matmul(self.key.T, self.mixing[-1][:, None] * self.value)
        return self.decay[-1] * self.matrix + written

    def decayed(self, x: Float[Array, "m k"]) -> Float[Array, "m k"]:
        """What reads M as row t of x reads what is left of it in M_t."""
        return self.decay[:, None] * x

    def scores(self, *xs: Float[Array, "m k"]) -> tuple[Float[Array, "m writes"], ...]:
        """How much of each value row t of each x reads in M_t."""
        return tuple(self.mixing * jnp.matmul(x, self.key.T) for x in xs)

    def adding(self, value: Float[Array, "writes v"]) -> "DecayChunk":
        """The same chunk with other values."""
        return self._replace(value=value)

    def affine(
        self,
        x: Float[Array, "m k"],
        scores: Float[Array, "m writes"] | None = None,
        erase: Float[Array, "erasing k"] | None = None,
    ) -> AffineChunk:
        """The chunk as a map of a matrix that it may partly erase, and that x reads.

        ``scores`` are those of x, for a caller that has them.
        """
        return AffineChunk(
            decay=jnp.broadcast_to(self.decay[-1:], x.shape[1:]),
            value=self.value,
            key=self.mixing[-1][:, None] * self.key,
            query=self.decayed(x),
            scores=self.scores(x)[0] if scores is None else scores,
            erase=erase,
        )

    def apply(self, x: Float[Array, "m k"]) -> Float[Array, "m v"]:
        """The product of M_t with row t of x."""
        old = jnp.matmul(self.decayed(x), self.matrix)
        return old + jnp.matmul(self.scores(x)[0], self.value)


def decay_chunk(
    matrix: Float[Array, "k v"],
    log_alpha: Float[Array, "m"],
    key: Float[Array, "m k"],
    value: Float[Array, "m v"],
) -> DecayChunk:
    """A chunk of tokens that are written as they are."""
    return DecayChunk(matrix, start_decay(log_alpha), decay_matrix(log_alpha), key, value)


class ScalarDecayMemory(MatrixMemory):
    """Matrix memories with one decay per token: M_t = alpha_t M_{t-1} + lam_t v_t k_t^T."""

    erases: ClassVar[bool] = False

    @abc.abstractmethod
    def coefficients(self, controls: Controls, ones: Float[Array, "*m"]) -> tuple[Array, Array]:
        """Returns (log alpha, lam) of tokens, from their controls; ``ones`` has their shape."""

    def step(self, state, anchor, key, value, controls) -> MatrixState:
        """Decays, and adds the outer product of one token."""
        del anchor
        log_alpha, lam = self.coefficients(controls, jnp.ones((), key.dtype))
        return MatrixState(jnp.exp(log_alpha) * state.matrix + lam * jnp.outer(key, value))

    def write(self, state, anchor, key, value, controls) -> tuple[MatrixState, DecayChunk]:
        """Adds a chunk in one matrix product."""
        del anchor
        log_alpha, lam = self.coefficients(controls, jnp.ones(key.shape[:1], key.dtype))
        mixing = decay_matrix(log_alpha) * lam[None]
        chunk = DecayChunk(state.matrix, start_decay(log_alpha), mixing, key, value)
        return MatrixState(chunk.end()), chunk


@dataclasses.dataclass(frozen=True)
class LinearAttention(ScalarDecayMemory):
    """Linear attention: M_t = M_{t-1} + v_t k_t^T (Eq. 12 of arXiv:2602.24281).

    It has no controls and no initial weights.

    Example:
      >>> import memcache_jax as mc
      >>> memory = mc.memories.LinearAttention()
      >>> sorted(memory.controls)
      []
    """

    on_chip: ClassVar[bool] = True
    takes_padding: ClassVar[bool] = True

    def coefficients(self, controls: Controls, ones: Float[Array, "*m"]) -> tuple[Array, Array]:
        """No decay but where documents begin, every token as it is."""
        return controls.get("log_alpha", jnp.zeros_like(ones)).astype(ones.dtype), ones

    def forgetting(self, controls: Controls, begins: Bool[Array, "m"]) -> Controls:
        """A decay to nothing where documents begin."""
        return {**controls, "log_alpha": jnp.where(begins, -jnp.inf, 0.0)}

    def write(self, state, anchor, key, value, controls) -> tuple[MatrixState, DecayChunk]:
        """Adds a chunk in one matrix product."""
        if controls:
            return super().write(state, anchor, key, value, controls)
        ones = jnp.ones(key.shape[:1], key.dtype)
        chunk = DecayChunk(state.matrix, ones, jnp.tri(len(ones), dtype=key.dtype), key, value)
        return MatrixState(state.matrix + jnp.matmul(key.T, value)), chunk


@dataclasses.dataclass(frozen=True)
class RetNet(ScalarDecayMemory):
    """Retention: M_t = gamma_h M_{t-1} + v_t k_t^T (arXiv:2307.08621), one fixed decay per head.

    Control: ``log_gamma`` (h,), <= 0. A layer takes log(1 - 2^(-5 - head)), as the paper does.

    Example:
      >>> import memcache_jax as mc
      >>> mc.memories.RetNet().controls["log_gamma"].axes
      'h'
    """

    on_chip: ClassVar[bool] = True
    takes_padding: ClassVar[bool] = True

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_gamma, the log of each head's decay."""
        return {
            "log_gamma": Control(
                axes="h",
                per_head=lambda heads: jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads)))),
                forget=-jnp.inf,
                most=0.0,
            )
        }

    def coefficients(self, controls: Controls, ones: Float[Array, "*m"]) -> tuple[Array, Array]:
        """The head's decay, every token as it is."""
        return controls["log_gamma"], ones


@dataclasses.dataclass(frozen=True)
class SSD(ScalarDecayMemory):
    """Mamba-2's state space duality: M_t = alpha_t M_{t-1} + lam_t v_t k_t^T (arXiv:2405.21060).

    Controls, each (b, t, h): ``log_alpha`` (<= 0) and ``lam``.

    Example:
      >>> import memcache_jax as mc
      >>> sorted(mc.memories.SSD().controls)
      ['lam', 'log_alpha']
    """

    on_chip: ClassVar[bool] = True
    takes_padding: ClassVar[bool] = True

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_alpha (decay, near 0), lam (weight of a token)."""
        return {
            "log_alpha": NEAR_ONE,
            "lam": Control(activation=jax.nn.softplus),
        }

    def coefficients(self, controls: Controls, ones: Float[Array, "*m"]) -> tuple[Array, Array]:
        """The controls as they are."""
        del ones
        return controls["log_alpha"], controls["lam"]
