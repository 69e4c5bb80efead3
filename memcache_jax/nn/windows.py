"""Attention to a window in blocks of queries, with memory that grows as the tokens do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.nn import spoilt

_LEAST = 64  # queries in a block: smaller products take longer


def block_size(window: int, length: int, whole: bool = False) -> int:
    """Queries that are attended to at once; ``length``, all, where blocks would save nothing.

    With ``whole``, blocks are whole windows.
    """
    block = window * -(-_LEAST // window) if whole else max(window, _LEAST)
    return block if length > 2 * block else length


def attend_window(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s g kk"],
    value: Float[Array, "b s g kk"],
    before: Int[Array, "_"],
    document: Int[Array, "_ s"] | None = None,
    mask: Bool[Array, "_ _ t s"] | None = None,
    *,
    window: int,
    implementation: Any = None,
    persistent: tuple[Float[Array, "p g k"], Float[Array, "p g k"]] | None = None,
) -> Float[Array, "b t h k"]:
    """Attention of each token to itself and those before it, within ``window`` and its document.

    A token may have several keys and values in a head, side by side along the last axis.

    Args:
      query: of t tokens.
      key: of the same tokens, after s - t earlier ones, which are all that the first may see.
      value: likewise.
      before: how many of the earlier ones are there, the last.
      document: a number for each of the s tokens.
      mask: takes away more.
      window: how many tokens a token sees.
      implementation: of ``jax.nn.dot_product_attention``.
      persistent: keys and values that all tokens see.
    """
    length, past = query.shape[1], key.shape[1] - query.shape[1]
    block = block_size(window, length, whole=not past)  # without a past, windows do not slide
    count = -(-length // block)
    fill = count * block - length
    query, key, value = (_padded(x, 1, 0, fill) for x in (query, key, value))
    key, value, bad = spoilt.cleaned(key, value, query.shape[2])
    if document is not None:
        document = _padded(document, 1, 0, fill)
    if mask is not None:
        mask = _padded(_padded(mask, 2, 0, fill), 3, 0, fill)
    here, there = np.arange(block)[:, None], np.arange(past + block)[None]
    begins = jnp.arange(count) * block

    def attend(begin: Array, query: Array, key: Array, value: Array, bad: Array) -> Array:
        ago = here + past - there
        seen = jnp.asarray((ago >= 0) & (ago < window))[None]
        seen = (seen & (begin + there >= past - before[:, None])[:, None])[:, None]
        if document is not None:
            own = lax.dynamic_slice_in_dim(document, begin, past + block, axis=1)
            seen &= (own[:, past:, None] == own[:, None])[:, None]
        if mask is not None:
            rows = lax.dynamic_slice_in_dim(mask, begin, block, axis=2)
            seen &= lax.dynamic_slice_in_dim(rows, begin, past + block, axis=3)
        lost = spoilt.by_mask(seen, bad)
        if persistent is not None:
            key, value, seen = _with_persistent(query, key, value, seen, persistent)
        y = jax.nn.dot_product_attention(
            query, key, value, mask=seen, implementation=implementation
        )
        return jnp.where(lost[..., None], jnp.nan, y)

    if count == 1:
        return attend(begins[0], query, key, value, bad)
    query = query.reshape(query.shape[0], count, block, *query.shape[2:])
    rows = (_overlapping(x, past, block) for x in (key, value, bad))
    y = jax.vmap(attend, in_axes=(0, 1, 1, 1, 1), out_axes=1)(begins, query, *rows)
    return y.reshape(y.shape[0], count * block, *y.shape[3:])[:, :length]


def _with_persistent(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s g kk"],
    value: Float[Array, "b s g kk"],
    seen: Bool[Array, "_ 1 t s"],
    persistent: tuple[Float[Array, "p g k"], Float[Array, "p g k"]],
) -> tuple[Float[Array, "b ps g k"], Float[Array, "b ps g k"], Bool[Array, "_ 1 t ps"]]:
    """Keys and values one after the other, persistent ones first, and which queries see them."""
    several = key.shape[-1] // query.shape[-1]

    def joined(always: Array, rows: Array) -> Array:
        always = jnp.broadcast_to(always.astype(rows.dtype), (len(rows), *always.shape))
        return jnp.concatenate([always, *jnp.split(rows, several, axis=-1)], axis=1)

    first = jnp.ones((*seen.shape[:3], len(persistent[0])), bool)
    seen = jnp.concatenate([first, *[seen] * several], axis=3)
    return joined(persistent[0], key), joined(persistent[1], value), seen


def _overlapping(
    x: Float[Array, "b s h *k"] | Bool[Array, "b s h"], past: int, block: int
) -> Array:
    """Each block of tokens with the ``past`` tokens before it, (b, blocks, past + block, h, k)."""
    x = _padded(x, 1, block - past, 0)
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.concatenate([x[:, :-1, block - past :], x[:, 1:]], axis=2)


def _padded(x: Array, axis: int, left: int, right: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = left, right
    return jnp.pad(x, widths)
