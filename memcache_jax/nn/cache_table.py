"""What a language model's cache is made of, in bytes."""

from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax.nn.attention import AttentionCache
from memcache_jax.nn.language_model import LanguageModel
from memcache_jax.nn.layer_cache import LayerCache
from memcache_jax.nn.model_cache import LanguageModelCache

_PARTS = ("initial", "state", "anchor", "key_sum", "record", "bank", "pooled")
_NAMES = dict(
    initial="initial states",
    state="live states",
    anchor="states at a chunk's start",
    key_sum="sums of keys",
    record="record of the slots",
    bank="cached states",
    pooled="pooled keys",
    tails="convolution tails",
    attention="keys and values",
)


def cache_bytes(cache: LanguageModelCache) -> dict[str, int]:
    """Bytes of each part of a cache, of all layers and rows together, but for the positions."""
    parts: dict[str, int] = {}

    def add(name: str, tree: Any) -> None:
        size = sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
        if size:
            parts[_NAMES[name]] = parts.get(_NAMES[name], 0) + size

    for small, states in zip(cache.layers, cache.states, strict=True):
        layer = small.with_states(states)
        if isinstance(layer, AttentionCache):
            add("attention", layer.states)
        elif isinstance(layer, LayerCache):
            add("tails", layer.tails)
            for name in _PARTS:
                add(name, getattr(layer.memory, name))
    return parts


def cache_table(model: LanguageModel, cache: LanguageModelCache, tokens: int) -> str:
    """A table of the bytes of a cache, and of keys and values of as many tokens.

    Args:
      model: the model.
      cache: its cache, or what ``jax.eval_shape`` says of it.
      tokens: of a row's history, over which bytes are spread.

    Example:
      >>> import memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=2, features=64, num_heads=4)
      >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
      >>> print(mc.nn.cache_table(model, model.init_cache(1, 4096), 4096).splitlines()[-1])
      a KV cache of this model            4,194,304     1,024.0
    """
    config = model.config
    head_dim = config.head_dim or config.features // config.num_heads
    rows = len(cache.position)
    keys_and_values = 2 * config.num_layers * config.num_heads * head_dim * rows * tokens
    parts = cache_bytes(cache)
    total = sum(parts.values())
    parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
    parts["all"] = total
    parts["a KV cache of this model"] = keys_and_values * jnp.dtype(config.dtype).itemsize
    lines = [f"{'part':<30} {'bytes':>14} {'per token':>11}"]
    lines += [f"{n:<30} {size:>14,} {size / (tokens * rows):>11,.1f}" for n, size in parts.items()]
    return "\n".join(lines)
