"""The bytes of a language model's cache, part by part."""

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from memcache_jax._checks import check_instance, check_integer
from memcache_jax.nn.config import LanguageModelConfig, Mixer
from memcache_jax.nn.grouped_attention import GroupedAttentionMixer
from memcache_jax.nn.language_model import LanguageModel
from memcache_jax.nn.latent_attention import LatentAttentionMixer
from memcache_jax.nn.model_cache import LanguageModelCache
from memcache_jax.nn.parallel import ParallelMixer
from memcache_jax.nn.recurrent import RecurrentMixer
from memcache_jax.streaming.protocol import MixerCache, count_bytes

_NAMES = dict(
    initial="initial states",
    state="live states",
    anchor="states at a chunk's start",
    pending="tokens of chunks not yet written",
    key_sum="sums of keys",
    record="record of the slots",
    bank="cached states",
    recent="tokens of live segments",
    pooled="pooled keys",
    tails="convolution tails",
    tail="last tokens of MLPs",
    transition="maps of live segments",
    key="keys and values",
    value="keys and values",
    past="to go back by tokens",
    rewindable="to go back by tokens",
    ends="last inputs at segments' ends",
)


def cache_bytes(cache: LanguageModelCache) -> dict[str, int]:
    """Bytes of each part of a cache, of all layers and rows together, without the positions."""
    check_instance("cache", cache, LanguageModelCache, "the cache of a LanguageModel")
    parts: dict[str, int] = {}
    for layers in cache.with_states(cache.layers):
        for path, x in jax.tree.leaves_with_path(layers):
            fields = [key.name for key in path if isinstance(key, GetAttrKey)]
            if not isinstance(layers, MixerCache):
                fields = ["other"]
            if x.size and "position" not in fields:
                name = next((_NAMES[field] for field in fields if field in _NAMES), fields[0])
                parts[name] = parts.get(name, 0) + count_bytes(x)
    return parts


def _width(mixer: Mixer, config: LanguageModelConfig) -> int:
    """Channels of a token's keys and values together, in one layer."""
    if isinstance(mixer, ParallelMixer):
        return _width(mixer.left, config) + _width(mixer.right, config)
    if isinstance(mixer, GroupedAttentionMixer):
        return 2 * mixer.num_kv_heads * mixer.head_dim
    if isinstance(mixer, LatentAttentionMixer):
        return mixer.rank + mixer.shared_dim
    if isinstance(mixer, RecurrentMixer):
        return sum(path.heads * path.dim for path in (mixer.key, mixer.value))
    return 2 * config.num_heads * (config.head_dim or config.features // config.num_heads)


def cache_table(model: LanguageModel, cache: LanguageModelCache, tokens: int) -> str:
    """A table of a cache's bytes, beside those of the keys and values of as many tokens.

    Args:
      model: the model.
      cache: its cache, or the result of ``jax.eval_shape`` on ``init_cache``.
      tokens: tokens in a row's history, which the bytes are divided by.

    Example:
      >>> import memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=2, features=64, num_heads=4)
      >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
      >>> print(mc.nn.cache_table(model, model.init_cache(1, 4096), 4096).splitlines()[-1])
      a KV cache of this model            4,194,304     1,024.0
    """
    check_instance("model", model, LanguageModel, "an mc.nn.LanguageModel")
    check_instance("cache", cache, LanguageModelCache, "the cache of a LanguageModel")
    tokens = check_integer("tokens", tokens)
    config = model.config
    rows = len(cache.position)
    layers = [block.mixer for blocks, repeats in config.stacks for block in blocks * repeats]
    keys_and_values = sum(_width(mixer, config) for mixer in layers) * rows * tokens
    parts = cache_bytes(cache)
    total = sum(parts.values())
    parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
    parts["all"] = total
    parts["a KV cache of this model"] = keys_and_values * jnp.dtype(config.dtype).itemsize
    lines = [f"{'part':<30} {'bytes':>14} {'per token':>11}"]
    lines += [f"{n:<30} {size:>14,} {size / (tokens * rows):>11,.1f}" for n, size in parts.items()]
    return "\n".join(lines)
