"""A chunk of descent steps on a deep memory."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Matrices

Loss: TypeAlias = Callable[[Array, Array], Array]
"""The inner loss of predictions and values, summed over rows."""

Parts: TypeAlias = tuple[Matrices, ...]
"""A state: its weights, layer by layer, and its momentum if it has any."""


class DescentChunk(NamedTuple):
    """A chunk as a map from the weights W and momentum S before it to those after it, W' and S'.

    With G_j the gradient of token j's loss at W, of M(x) = x + gelu(x W_0) W_1 or M(x) = x W_0::

        W' = decay[0, 0] W + decay[0, 1] S - sum_j mixing[0, j] G_j
        S' =                 decay[1, 1] S - sum_j mixing[1, j] G_j

    Without momentum the second line and S are left out.
    """

    key: Float[Array, "m k"]
    value: Float[Array, "m v"]
    decay: Float[Array, "parts parts"]
    mixing: Float[Array, "parts m"]

    def end(self, start: Parts, loss: Loss) -> Parts:
        """The state after the last token."""
        prediction, pull = jax.vjp(lambda weights: _forward(weights, self.key), start[0])
        error = jax.grad(loss)(prediction, self.value)

        def part(i: int) -> Matrices:
            (written,) = pull(self.mixing[i][:, None] * error)
            layers = zip(*start, strict=True)
            kept = (sum(self.decay[i, p] * x for p, x in enumerate(layer)) for layer in layers)
            return tuple(x - change for x, change in zip(kept, written, strict=True))

        return tuple(map(part, range(len(start))))


def _forward(weights: Matrices, x: Float[Array, "m k"]) -> Float[Array, "m v"]:
    if len(weights) == 1:
        return jnp.matmul(x, weights[0])
    return x + jnp.matmul(jax.nn.gelu(jnp.matmul(x, weights[0])), weights[1])
