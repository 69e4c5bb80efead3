"""A language model whose layers are a list of modules, not one stacked module in a scan."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import spmd

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.block import Period
from memcache_jax.nn.language_model import LanguageModel

_AXIS = {"partition_name": "layers"}


class UnrolledCache(NamedTuple):
    """A stream's past: a cache per block of each layer, and the tokens that each row has taken."""

    layers: Any
    position: Int[Array, "b"]


class Unrolled(nnx.Module):
    """A ``LanguageModel`` with its layers in a list, where tools find them: qwix, ``nnx.capture``.

    Its parameters are those of the model, which is not changed.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.config = model.config
        self.outer = nnx.merge(*nnx.split(model))
        graph, stacked = nnx.split(self.outer.layers)
        self.layers = nnx.List([])
        for layer in range(self.config.repeats):
            state = jax.tree.map(operator.itemgetter(layer), stacked)
            self.layers.append(nnx.merge(graph, spmd.remove_axis(state, 0, _AXIS)))
        del self.outer.layers

    def language_model(self) -> LanguageModel:
        """Returns the parameters as a ``LanguageModel``, for ``mc.generate`` and checkpoints."""
        if any(isinstance(x, nnx.LoRAParam) for _, x in nnx.iter_graph(self)):
            raise ValueError("a LanguageModel has no place for the parameters of LoRA")
        model = nnx.merge(*nnx.split(self.outer))
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(nnx.state, self.layers))
        graph = nnx.graphdef(self.layers[0])
        model.layers = nnx.merge(graph, spmd.add_axis(stacked, 0, _AXIS))
        return model

    def hidden(
        self, tokens: Int[Array, "b t"], document_ids: Int[Array, "b t"] | None
    ) -> Float[Array, "b t d"]:
        """As ``LanguageModel.hidden``."""
        run: Any = nnx.remat(Period.__call__) if self.config.remat else Period.__call__
        x = self.outer._embed(tokens)
        for period in self.layers:
            x = run(period, x, document_ids)
        return self.outer.norm(x)

    def init_cache(self, batch_size: int, max_length: int, options: dict) -> UnrolledCache:
        """Returns an empty cache."""
        layers = [layer.init_cache(batch_size, max_length, options) for layer in self.layers]
        return UnrolledCache(layers, jnp.zeros(batch_size, jnp.int32))

    def extend(
        self, tokens: Int[Array, "b t"], cache: UnrolledCache, lengths: Int[Array, "b"] | None
    ) -> tuple[Float[Array, "b t d"], UnrolledCache]:
        """As ``LanguageModel.extend``."""
        x, new = self.outer._embed(tokens), []
        for period, caches in zip(self.layers, cache.layers, strict=True):
            x, caches = period.extend(x, caches, lengths)
            new.append(caches)
        taken = tokens.shape[1] if lengths is None else lengths
        return self.outer.norm(x), UnrolledCache(new, cache.position + taken)
