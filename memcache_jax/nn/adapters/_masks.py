"""What a host's attention mask says: which tokens are real, and where documents begin."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from memcache_jax._typing import Array, Bool, Float, Int


class Rows(NamedTuple):
    """The tokens of a call.

    Attributes:
      real: tokens that are not padding, which is what does not see itself.
      first: the first token that each sees, with which its document begins.
      honoured: tokens that see just their document up to themselves, and padding.
    """

    real: Bool[Array, "b t"]
    first: Int[Array, "b t"]
    honoured: Bool[Array, "b t"]


def read_mask(mask: Array, begin: Any = 0) -> Rows:
    """Reads a mask (b, t, s) of t queries over s keys, their own of which begin at ``begin``."""
    if mask.ndim != 3 or mask.shape[2] < mask.shape[1]:
        raise ValueError(f"the mask must be (b, t, s) with s >= t, got shape {mask.shape}")
    count = mask.shape[1]
    own = lax.dynamic_slice_in_dim(mask.astype(bool), begin, count, axis=2)
    place = jnp.arange(count)[None]
    real = jnp.diagonal(own, axis1=1, axis2=2)
    first = jnp.argmax(own, axis=2)
    run = (first[..., None] <= place[:, None]) & (place[:, None] <= place[..., None])
    before = ((0, 0), (1, 0))
    goes_on = jnp.pad(real, before)[:, :-1] & (jnp.pad(first, before)[:, :-1] == first)
    known = (own == run).all(axis=2) & (goes_on | (first == place))
    return Rows(real, first, known | ~real)


def read_rows(
    shape: tuple[int, ...], mask: Array | None, ids: Array | None, positions: Array | None
) -> Rows:
    """Reads a mask, or else ids of documents, or else positions in them."""
    if mask is not None:
        return read_mask(mask)
    every, first = jnp.ones(shape, bool), jnp.zeros(shape, jnp.int32) if ids is None else ids
    if ids is None and positions is not None:
        goes_on = positions[:, 1:] == positions[:, :-1] + 1
        first = jnp.cumsum(jnp.pad(~goes_on, ((0, 0), (1, 0))), axis=1)
    return Rows(every, first, every)


def read_next(mask: Array, begin: Any, position: Int[Array, "b"]) -> tuple[Array, Array, Array]:
    """Reads a stream's next mask, after ``position`` real tokens and ``begin`` with padding.

    Returns the padding on the left, how many tokens are real, and ``honoured``.
    """
    real, first, honoured = read_mask(mask, begin)
    padding = jnp.argmax(real, axis=1)
    ordinal = jnp.cumsum(real, axis=1)
    alone = (first == padding[:, None]) & (mask.sum(axis=2) == position[:, None] + ordinal)
    return padding, ordinal[:, -1], ~real | (honoured & alone)


def checked(honoured: Bool[Array, "b t"], y: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Raises ValueError unless all tokens are honoured; under a trace, the others become NaN."""
    if not isinstance(honoured, Tracer) and not np.asarray(honoured).all():
        row, token = np.argwhere(~np.asarray(honoured))[0]
        raise ValueError(
            "a memory honours masks that are causal, in documents that are runs of tokens, with "
            f"or without padding around them; got another one at row {row}, token {token}"
        )
    return jnp.where(honoured[..., None], y, jnp.nan)


def shift(x: Array, by: Int[Array, "b"]) -> Array:
    """Moves each row by so many places to the left; what leaves it comes in at the right."""
    return jax.vmap(lambda row, by: jnp.roll(row, -by, axis=0))(x, by)
