"""A language model whose layers are a list of modules, not one stacked module in a scan."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import spmd

from memcache_jax import _checks
from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.block import Period, stream_of
from memcache_jax.nn.calls import ModelCall, answer, read_call
from memcache_jax.nn.config import LanguageModelConfig
from memcache_jax.nn.language_model import LanguageModel, as_layers, remat_policy
from memcache_jax.nn.model_cache import LanguageModelCache, put_row
from memcache_jax.nn.stack import layer_of
from memcache_jax.sharding.layout import context_mesh
from memcache_jax.streaming.protocol import count_bytes
from memcache_jax.streaming.rewind import taken_back

_MOST_PERIODS, _LEAST_BYTES = 8, 1 << 20


class UnrolledCache(NamedTuple):
    """A stream's past: the caches of each layer, and each row's tokens so far."""

    layers: list
    position: Int[Array, "b"]

    @property
    def rewindable(self) -> Array | None:
        """By how many tokens each row can go back, (b,); None where none can."""
        of_layers = [
            getattr(cache, "rewindable", None) for caches in self.layers for cache in caches
        ]
        return None if any(one is None for one in of_layers) else of_layers[0]

    def rewind(self, tokens: jax.typing.ArrayLike) -> "UnrolledCache":
        """As ``LanguageModelCache.rewind``."""
        taken = _checks.check_rewind(tokens, self.rewindable, len(self.position))
        layers = [[cache.rewind(taken) for cache in caches] for caches in self.layers]
        position, _ = taken_back(self.position, self.layers[0][0].rewindable, taken)
        return UnrolledCache(layers, position)

    def put(self, row: jax.typing.ArrayLike, other: "UnrolledCache") -> "UnrolledCache":
        """As ``LanguageModelCache.put``."""
        letters = [[cache.letters() for cache in caches] for caches in self.layers]
        return put_row(UnrolledCache(letters, "b"), self, row, other)  # type: ignore[arg-type]


def unrolled_cache(config: LanguageModelConfig, cache: LanguageModelCache) -> UnrolledCache:
    """The cache of a ``LanguageModel``, whose layers share arrays, as one for its ``Unrolled``."""

    def layer(number: int, own: slice) -> list:
        one = jax.tree.map(lambda x: x[number], (cache.layers[own], cache.states[own]))
        return [small.with_states(states) for small, states in zip(*one, strict=True)]

    layers, begin = [], 0
    for blocks, repeats in config.stacks:
        own = slice(begin, begin + len(blocks))
        layers += [layer(number, own) for number in range(repeats)]
        begin += len(blocks)
    return UnrolledCache(layers, cache.position)


def stacked_cache(
    config: LanguageModelConfig, cache: UnrolledCache, max_length: int | None
) -> LanguageModelCache:
    """The inverse of ``unrolled_cache``: the cache of a ``LanguageModel``."""
    layers, states, begin = [], [], 0
    for _, repeats in config.stacks:
        for own in zip(*cache.layers[begin : begin + repeats], strict=True):
            stacked: Any = jax.tree.map(lambda *x: jnp.stack(x), *own)
            states.append(stacked.states)
            layers.append(stacked.with_states(jax.tree.map(lambda _: None, stacked.states)))
        begin += repeats
    return LanguageModelCache(layers, states, cache.position, max_length)


class Unrolled(nnx.Module):
    """A ``LanguageModel`` with its layers in a list, where qwix can put parameters of LoRA.

    Its parameters are those of the model, which is not changed.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.config = model.config
        self.outer = nnx.merge(*nnx.split(model))
        self.axis_name = _axis_name(self.outer.stacks[0][0])
        self.layers = nnx.List([])
        for layers, repeats in self.outer.stacks:
            for index in range(repeats):
                graph, state = nnx.split(layer_of(layers, repeats, index))
                self.layers.append(nnx.merge(graph, spmd.remove_axis(state, 0, self._stacking)))
        del self.outer.layers

    def language_model(self) -> LanguageModel:
        """Returns the parameters as a ``LanguageModel``, for ``mc.generate`` and checkpoints."""
        if any(isinstance(x, nnx.LoRAParam) for _, x in nnx.iter_graph(self)):
            raise ValueError("a LanguageModel has no place for the parameters of LoRA")
        model = nnx.merge(*nnx.split(self.outer))
        stacks, layers = [], list(self.layers)
        for _, repeats in self.config.stacks:
            own, layers = layers[:repeats], layers[repeats:]
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(nnx.state, own))
            graph = nnx.graphdef(own[0])
            stacks.append(nnx.merge(graph, spmd.add_axis(stacked, 0, self._stacking)))
        model.layers = as_layers(stacks)
        return model

    def __call__(
        self, tokens: Int[Array, "b t"], *, cache: Any = None, **call: Unpack[ModelCall]
    ) -> Any:
        """As ``LanguageModel``'s, but without the output layer."""
        read = read_call(tokens.shape, None, num_heads=self.config.num_heads, **call)
        return answer(read, tokens, cache, whole=self.hidden, extend=self.extend)

    def hidden(
        self, tokens: Int[Array, "b t"], document_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """As ``LanguageModel.hidden``."""
        run: Any = Period.__call__
        if self.config.remat:
            run = nnx.remat(run, policy=remat_policy(self.config))
        x = self.outer._embed(tokens)
        for period in self.layers:
            x = run(period, x, document_ids)
        return self.outer.norm(stream_of(x))

    def init_cache(self, batch_size: int, max_length: int, **options: Any) -> UnrolledCache:
        """As ``LanguageModel.init_cache``."""
        layers = [period.init_cache(batch_size, max_length, options) for period in self.layers]
        return UnrolledCache(layers, jnp.zeros(batch_size, jnp.int32))

    def extend(
        self, tokens: Int[Array, "b t"], cache: UnrolledCache, lengths: Int[Array, "b"] | None
    ) -> tuple[Float[Array, "b t d"], UnrolledCache]:
        """As ``LanguageModel.extend``."""
        x, layers = self.outer._embed(tokens), []
        for period, caches in zip(self.layers, cache.layers, strict=True):
            x, caches = period.extend(x, caches, lengths)
            layers.append(caches)
        taken = tokens.shape[1] if lengths is None else lengths
        hidden = self.outer.norm(stream_of(x))
        return hidden, UnrolledCache(layers, _checks.advanced(cache.position, taken))

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
        """As ``LanguageModel.logits``."""
        return self.outer.logits(hidden)

    @property
    def _stacking(self) -> dict[str, Any]:
        return dict(partition_name=self.axis_name)


def for_steps(model: LanguageModel) -> LanguageModel | Unrolled:
    """The model as it takes single tokens fastest, over and over in one program.

    A loop over layers copies the parameters of each before their products, for every token. Apart,
    they are copied once, and the program has the layers one by one: so it is done for few layers
    that have many parameters, on one device.
    """
    repeats = [repeats for _, repeats in model.config.stacks]
    if max(repeats) == 1 or sum(repeats) > _MOST_PERIODS:
        return model
    params = jax.tree.leaves(nnx.state(model.layers, nnx.Param))
    if count_bytes(params) < _LEAST_BYTES or context_mesh(*params) is not None:
        return model
    return Unrolled(model)


def cache_for(stepping: LanguageModel | Unrolled, cache: LanguageModelCache) -> Any:
    """A model's cache, as what ``for_steps`` returned for the model takes it."""
    return unrolled_cache(stepping.config, cache) if isinstance(stepping, Unrolled) else cache


def _axis_name(layers: nnx.Module) -> Any:
    """What the axis over layers is called in their parameters."""
    metadata = (param.get_metadata() for _, param in nnx.to_flat_state(nnx.state(layers)))
    names = (of_param.get("out_sharding") for of_param in metadata)
    return next((first for first, *_ in filter(None, names)), None)
