"""Keys and values that are not finite spoil the outputs of queries that see them, and no others.

A weight of 0 times NaN is NaN, so that they would reach queries before them and of other documents.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int


def cleaned(
    key: Float[Array, "b s g k"], value: Float[Array, "b s g k"], heads: int
) -> tuple[Float[Array, "b s g k"], Float[Array, "b s g k"], Bool[Array, "b s h"]]:
    """Keys and values with zeros for numbers that are not finite, and which tokens had any.

    The last is for each head of the queries; g heads of keys serve as many of them each.
    """
    fine = [jnp.isfinite(x) for x in (key, value)]
    key, value = (jnp.where(mask, x, 0) for mask, x in zip(fine, (key, value), strict=True))
    bad = ~(fine[0].all(axis=-1) & fine[1].all(axis=-1))
    return key, value, bad if heads == bad.shape[2] else jnp.repeat(bad, heads // bad.shape[2], 2)


def by_mask(seen: Bool[Array, "_ _ t s"], bad: Bool[Array, "b s h"]) -> Bool[Array, "b t h"]:
    """Whether a query sees a bad token."""
    of_key = jnp.moveaxis(bad, 2, 1)[:, :, None]
    return jnp.moveaxis((seen & of_key).any(axis=-1), 1, 2)


def by_place(
    bad: Bool[Array, "b t h"], document: Int[Array, "b t"] | None, window: int | None
) -> Bool[Array, "b t h"]:
    """As ``by_mask``, where a token sees all before it of its document and in its window."""
    place = np.arange(bad.shape[1])[None]
    first = np.maximum(place - ((window or bad.shape[1]) - 1), 0)
    if document is not None:
        begins = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)))
        first = jnp.maximum(first, lax.cummax(jnp.where(begins, place, 0), axis=1))
    last = lax.cummax(jnp.where(bad, place[..., None], -1), axis=1)
    return last >= first[..., None]
