"""An output layer's losses and gradients, a piece of the tokens after the other.

Each piece gives its part of the gradient while it has its logits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._checks import LARGEST
from memcache_jax._typing import Array, Float, Int
from memcache_jax._varying import alike
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import MeshAxes

LOGITS = 1 << 24
"""The most logits that a device holds at once, unless a single token has more."""


@dataclasses.dataclass(frozen=True)
class OutputLayer:
    """The output layer, for the tokens and words of each device.

    Attributes:
      scale: factor of the logits.
      z_loss: weight of the z-loss.
      division: how tokens and words lie on a mesh.
    """

    scale: float
    z_loss: float
    division: Division | None

    @classmethod
    def of(
        cls, hidden: Array, matrix: Array, targets: Array, *, scale: float, z_loss: float = 0.0
    ) -> "OutputLayer":
        """The layer for arrays that lie on a mesh as these do."""
        division = Division.of((hidden, "b t d"), (targets, "b t"), (matrix, "d w"))
        if division is not None and hidden.shape[1] % division.parts:
            division = division.whole("t")
        return cls(scale, z_loss, division)

    def scores(
        self, hidden: Float[Array, "b t d"], matrix: Float[Array, "d vocab"], targets: Array
    ) -> tuple[Array, ...]:
        """Each target's log-probability and log-partition, and whether it is the most likely."""
        return self._run(self._scores, (hidden, matrix, targets), ("b t", "b t", "b t"))

    def gradient(
        self,
        hidden: Float[Array, "b t d"],
        matrix: Float[Array, "d vocab"],
        targets: Int[Array, "b t"],
        weights: Float[Array, "b t"],
    ) -> tuple[Array, ...]:
        """Log-probabilities and -partitions, and the gradients of the total.

        These are of hidden, in its ``gradient_dtype``, and of the matrix, in float32 or wider.
        """
        arrays, out = (hidden, matrix, targets, weights), ("b t", "b t", "b t d", "d w")
        return self._run(self._gradient, arrays, out)

    def total(
        self,
        log_probability: Float[Array, "b t"],
        log_partition: Float[Array, "b t"],
        weights: Float[Array, "b t"],
    ) -> Float[Array, ""]:
        """The weighted sum."""
        value = -log_probability
        if self.z_loss:  # 0 times the infinite is NaN
            value += self.z_loss * log_partition**2
        return jnp.sum(jnp.where(weights == 0, 0, weights * value))

    def _run(self, local: Callable[..., Any], arrays: tuple[Array, ...], out: tuple) -> Any:
        if self.division is None:
            return local(*arrays)
        letters = ("b t d", "d w", "b t", "b t")[: len(arrays)]
        return self.division.run(local, arrays, letters, out)

    def _scores(self, hidden: Array, matrix: Array, targets: Array) -> tuple[Array, ...]:
        vocab, matrix = matrix.shape[1], matrix.astype(hidden.dtype)

        @jax.checkpoint
        def of_piece(matrix: Array, piece: tuple[Array, Array]) -> tuple[Array, ...]:
            logits, words = self._logits(piece[0], matrix), self._words(vocab)
            largest, log_partition = _log_partition(logits, words.axes)
            first = jnp.where(logits == largest[:, None], words.ids, LARGEST).min(axis=-1)
            greedy = (lax.pmin(first, words.axes) if words.axes else first) == piece[1]
            return words.of_targets(logits, piece[1]) - log_partition, log_partition, greedy

        pieces = _pieces((hidden, targets), vocab)
        every = lax.map(functools.partial(of_piece, matrix), pieces)
        return tuple(_whole(x, targets.shape) for x in every)

    def _gradient(self, hidden: Array, matrix: Array, targets: Array, weights: Array) -> tuple:
        vocab, matrix = matrix.shape[1], matrix.astype(hidden.dtype)

        def add(d_matrix: Array, piece: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
            hidden, targets, weights = piece
            logits, words = self._logits(hidden, matrix), self._words(vocab)
            _, log_partition = _log_partition(logits, words.axes)
            log_probability = words.of_targets(logits, targets) - log_partition
            of_partition = (
                weights * (1 + 2 * self.z_loss * log_partition) if self.z_loss else weights
            )
            shares = jnp.exp(logits - log_partition[:, None])
            of_target = jnp.where(words.ids == targets[:, None], weights[:, None], 0)
            d_logits = self.scale * (of_partition[:, None] * shares - of_target)
            d_logits = jnp.where((weights != 0)[:, None], d_logits, 0)
            d_logits = d_logits.astype(gradient_dtype(hidden))
            d_hidden = _product(d_logits, matrix.T)
            d_matrix += _product(hidden.T, d_logits)
            return d_matrix, (log_probability, log_partition, d_hidden)

        pieces = _pieces((hidden, targets, weights), vocab)
        zeros: Any = alike((jnp.zeros_like(matrix, _wide(hidden)), pieces))[0]
        d_matrix, every = lax.scan(add, zeros, pieces)
        *scores, d_hidden = (_whole(x, targets.shape) for x in every)
        if self.division is not None:
            d_hidden = _summed(d_hidden, self.division.w)
            d_matrix = _summed(d_matrix, (*self.division.b, *self.division.t))
        return *scores, d_hidden.astype(gradient_dtype(hidden)), d_matrix

    def _logits(self, hidden: Array, matrix: Array) -> Array:
        """The logits of a device's words."""
        logits = _product(hidden, matrix)
        return logits if self.scale == 1 else self.scale * logits

    def _words(self, vocab: int) -> "_Words":
        """A device's words, so many of them."""
        axes = () if self.division is None else self.division.w
        first = lax.axis_index(axes) * vocab if axes else 0
        parts = lax.axis_size(axes) if axes else 1
        return _Words(axes, (first + jnp.arange(vocab))[None], vocab * parts)


class _Words(NamedTuple):
    """A device's part of the vocabulary.

    Attributes:
      axes: the mesh's axes that divide the vocabulary.
      ids: (1, words).
      size: of the whole vocabulary.
    """

    axes: MeshAxes
    ids: Int[Array, "1 words"]
    size: int

    def of_targets(self, logits: Array, targets: Array) -> Array:
        """The logit of each target; NaN for ids outside of the vocabulary."""
        place = targets - self.ids[0, 0]
        own = (place >= 0) & (place < logits.shape[1])
        logit = jnp.take_along_axis(logits, jnp.where(own, place, 0)[:, None], axis=-1)[:, 0]
        logit = _summed(jnp.where(own, logit, 0), self.axes)
        return jnp.where((targets >= 0) & (targets < self.size), logit, jnp.nan)


def gradient_dtype(x: Array) -> Any:
    """The dtype of x's gradient until it has its factor, such as float16's loss scale.

    Gradients of a mean over many tokens and words are below what float16 can express.
    """
    return jnp.float32 if x.dtype == jnp.float16 else x.dtype


def _log_partition(logits: Array, axes: MeshAxes) -> tuple[Array, Array]:
    """The largest logit of each row, and the log of the sum of their exponentials."""
    largest = lax.stop_gradient(logits).max(axis=-1)
    largest = lax.pmax(largest, axes) if axes else largest
    shift = jnp.where(jnp.isfinite(largest), largest, 0)
    total = _summed(jnp.exp(logits - shift[:, None]).sum(axis=-1), axes)
    return largest, shift + jnp.log(total)


def _pieces(arrays: tuple[Array, ...], vocab: int) -> tuple[Array, ...]:
    """Arrays (b, t, ...) as (pieces, tokens, ...), the last filled up with zeros."""
    tokens = math.prod(arrays[0].shape[:2])
    count = max(1, -(-tokens * vocab // LOGITS))
    size = -(-tokens // count)

    def cut(x: Array) -> Array:
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, ((0, count * size - tokens), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(count, size, *x.shape[1:])

    return tuple(map(cut, arrays))


def _whole(x: Array, shape: tuple[int, ...]) -> Array:
    """Pieces (pieces, tokens, ...) as an array (b, t, ...)."""
    x = x.reshape(-1, *x.shape[2:])
    return x[: math.prod(shape)].reshape(*shape, *x.shape[1:])


def _summed(x: Array, axes: MeshAxes) -> Array:
    return lax.psum(x, axes) if axes else x


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, preferred_element_type=_wide(x))


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
