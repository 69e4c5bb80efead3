"""Reading prompts into caches whose rows then go back by tokens."""

import dataclasses
from typing import Any

import jax

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn import LanguageModel
from memcache_jax.streaming.cache import Cache


def prefill(
    model: LanguageModel, prompt: Int[Array, "b t"], cache: Any, lengths: Int[Array, "b"]
) -> tuple[Float[Array, "b t d"], Any]:
    """As ``model.extend``, for tokens into which no row goes back.

    The cache then keeps no state before each token, which going back would need, and a prompt takes
    no longer than in a cache without ``rewind``. Rows can go back into the tokens of later calls.
    """
    hidden, cache = model.extend(prompt, _with(cache, stays=True), lengths)
    return hidden, _with(cache, stays=False)


def _with(tree: Any, stays: bool) -> Any:
    def changed(cache: Any) -> Any:
        if not isinstance(cache, Cache):
            return cache
        return cache.replace(config=dataclasses.replace(cache.config, stays=stays))

    return jax.tree.map(changed, tree, is_leaf=lambda x: isinstance(x, Cache))
