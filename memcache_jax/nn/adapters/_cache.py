"""A cache as hosts step it: their masks are over keys in the order in which tokens came."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Int


class HostCache(NamedTuple):
    """A stream's past, and the tokens that came with padding, the same number in all rows."""

    past: Any
    end_index: Int[Array, "b"]


def empty(past: Any, batch_size: int) -> HostCache:
    """The cache of rows without tokens."""
    return HostCache(past, jnp.zeros(batch_size, jnp.int32))


def extend(
    run: Callable[..., tuple[Array, Any]], x: Array, cache: HostCache, mask: Any
) -> tuple[Array, HostCache]:
    """Continues a stream by the host's next tokens, with ``run(x, cache=, mask=, segment_ids=)``.

    Tokens that the mask hides from themselves are padding, in the middle of a row too: a row that
    draws the padding's token goes on as if it had not.
    """
    past, end = cache
    if mask is None or jnp.ndim(mask) != 3:
        got = "none" if mask is None else f"shape {jnp.shape(mask)}"
        raise ValueError(f"with a cache, the mask must be (b, t, keys), got {got}")
    own = lax.dynamic_slice_in_dim(mask, end[0], x.shape[1], axis=2)
    real = jnp.diagonal(own, axis1=1, axis2=2).astype(jnp.int32)
    y, past = run(x, cache=past, mask=mask, segment_ids=real)
    return y, HostCache(past, end + x.shape[1])
