"""Chunks of deep memories, through which each token reads the weights after its own write."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.memories.muon import orthogonalized


class DeepState(NamedTuple):
    """Weights and momentum of one head's network, layer by layer."""

    weights: Matrices
    momentum: Matrices = ()


class DeepChunk(NamedTuple):
    """A chunk of a deep memory, from which the weights at each of its tokens follow.

    With the start state (W, S), the weights of a layer after token t are
    ``weight_decay[t] W + momentum_decay[t] S - sum_j mixing[t, j] deltas[j] inputs[j]^T``.
    """

    start: DeepState
    weight_decay: Float[Array, "m"]
    momentum_decay: Float[Array, "m"] | None
    mixing: Float[Array, "m m"]
    inputs: Matrices
    deltas: Matrices

    def end(self, ns_steps: int = 0) -> Matrices:
        """The weights after the last token, or with ``ns_steps`` after a full chunk's Muon step."""
        written = (
            jnp.matmul(x.T, self.mixing[-1][:, None] * delta)
            for x, delta in zip(self.inputs, self.deltas, strict=True)
        )
        steps = tuple(-change for change in written)
        if self.momentum_decay is not None:
            left = self.momentum_decay[-1]
            steps = tuple(x + left * s for x, s in zip(steps, self.start.momentum, strict=True))
        if ns_steps:
            steps = tuple(orthogonalized(x, ns_steps) for x in steps)
        kept = (self.weight_decay[-1] * w for w in self.start.weights)
        return tuple(w + x for w, x in zip(kept, steps, strict=True))

    def keep_layer(self, layer: int) -> "DeepChunk":
        """The chunk with None for the other layers."""

        def keep(matrices: Matrices) -> Any:
            return tuple(x if i == layer else None for i, x in enumerate(matrices))

        start = DeepState(keep(self.start.weights), keep(self.start.momentum))
        return self._replace(start=start, inputs=keep(self.inputs), deltas=keep(self.deltas))

    def apply(self, layer: int, x: Float[Array, "m in"]) -> Float[Array, "m out"]:
        """A layer with the weights it has after each token, never forming those weights."""
        scores = self.mixing * jnp.matmul(x, self.inputs[layer].T)
        y = self.weight_decay[:, None] * jnp.matmul(x, self.start.weights[layer])
        if self.momentum_decay is not None:
            y += self.momentum_decay[:, None] * jnp.matmul(x, self.start.momentum[layer])
        return y - jnp.matmul(scores, self.deltas[layer])


class DocumentsChunk(NamedTuple):
    """A chunk in which documents begin: two chunks, of which each token takes one."""

    began: Float[Array, "m"]  # 1 where a document has begun; a float, for cotangents
    before: DeepChunk
    after: DeepChunk

    def keep_layer(self, layer: int) -> "DocumentsChunk":
        """The chunks with None for the other layers."""
        before, after = (chunk.keep_layer(layer) for chunk in (self.before, self.after))
        return self._replace(before=before, after=after)

    def apply(self, layer: int, x: Float[Array, "m in"]) -> Float[Array, "m out"]:
        """A layer with the weights that each token's document gave it."""
        before, after = (chunk.apply(layer, x) for chunk in (self.before, self.after))
        return jnp.where(self.began[:, None] > 0, after, before)
