"""A cache as hosts step it: by a mask, with padding on the left of the first tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.adapters._masks import checked, read_next, shift


class HostCache(NamedTuple):
    """A stream's past, and each row's tokens so far."""

    past: Any
    position: Int[Array, "b"]  # without padding
    end_index: Int[Array, "b"]  # with padding, the same for all rows


def empty(past: Any, batch_size: int) -> HostCache:
    """The cache of rows without tokens."""
    # Two arrays, since hosts donate them.
    return HostCache(past, *(jnp.zeros(batch_size, jnp.int32) for _ in range(2)))


def extend(
    run: Callable[[Array, Any, Array], tuple[Array, Any]], x: Array, cache: HostCache, mask: Any
) -> tuple[Float[Array, "b t d"], HostCache]:
    """Continues a stream by the host's next tokens.

    ``run`` takes tokens, a past, and how many of each row's tokens count, and returns the outputs
    and the new past. It sees each row without its padding.
    """
    if mask is None:
        raise ValueError("a cache goes on by the attention mask of the new tokens, got none")
    padding, lengths, honoured = read_next(mask, cache.end_index[0], cache.position)
    y, past = run(shift(x, padding), cache.past, lengths)
    y = checked(honoured, shift(y, -padding))
    return y, HostCache(past, cache.position + lengths, cache.end_index + x.shape[1])
