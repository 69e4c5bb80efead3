"""Attention masks as hosts make them: their shapes, and what in them a memory cannot follow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class Mask(NamedTuple):
    """A mask, True where a query sees a key, with the batch and head axes that it came with.

    Attributes:
      seen: booleans (b or 1, h or 1, t, s).
      legible: whether a query's values are all 0 or 1, in every head, (b or 1, t).
    """

    seen: Any
    legible: Any


def known(*arrays: Any) -> bool:
    """Whether the values of all these arrays, or None, can be looked at here."""
    return not any(
        isinstance(x, Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable)
        for x in arrays
    )


def read_mask(
    mask: Any, shape: tuple[int, ...], num_heads: int, *, keys: int | None, xp: Any
) -> Mask:
    """Brings a mask to four axes, or raises ValueError for what is none.

    Args:
      mask: booleans, or 0 and 1, that broadcast to (b, h, t, keys). The first of three axes is
        the batch, or the heads where it has their size and not the batch's.
      shape: (b, t), of the input.
      num_heads: h.
      keys: size of the last axis; None for any size, as in the cache of a host.
      xp: NumPy where the values are known, otherwise JAX's.
    """
    batch, length = shape
    given = jnp.shape(mask)
    mask = four_axes(xp.asarray(mask), batch, num_heads)
    wanted = f"(b, h, t, {'keys' if keys is None else 't'}) = ({batch}, {num_heads}, {length}, "
    wanted += "any)" if keys is None else f"{keys})"
    fits = mask.ndim == 4 and all(
        size in (1, full)
        for size, full in zip(mask.shape, (batch, num_heads, length, keys), strict=True)
        if full is not None
    )
    if not fits:
        raise ValueError(f"mask must broadcast to {wanted}, got shape {given}")
    seen = mask != 0
    binary = seen if mask.dtype == bool else (mask == 0) | (mask == 1)
    if xp is np and mask.dtype != bool and not binary.all():
        raise ValueError(
            f"mask must hold booleans, or 0 and 1, got {mask[~binary][0]}; a mask that is added to "
            "scores is mask == 0"
        )
    last = mask.shape[3] if keys is None else keys
    seen = xp.broadcast_to(seen, (*mask.shape[:2], length, last))
    if mask.dtype == bool:
        return Mask(seen, xp.ones((len(mask), length), bool))
    return Mask(seen, xp.broadcast_to(binary, seen.shape).all(axis=(1, 3)))


def four_axes(mask: Any, batch: int, num_heads: int) -> Any:
    """The mask with the axes of the batch and of heads that it lacks."""
    if mask.ndim == 3:
        return mask[None] if mask.shape[0] == num_heads != batch else mask[:, None]
    return mask[None, None] if mask.ndim == 2 else mask


def padding_tokens(seen: Any, xp: Any) -> Any:
    """Tokens that neither see themselves nor are seen by another, (b, t): their rows mean nothing.

    ``seen`` is (b, h, t, t).
    """
    itself = xp.diagonal(seen, axis1=2, axis2=3).any(axis=1)
    return ~itself & ~seen.any(axis=(1, 2))


def explain(seen: np.ndarray, wanted: np.ndarray, right: np.ndarray) -> str:
    """Tells what a memory cannot follow in the first row that is not ``right``.

    Args:
      seen: what the mask says, (b or 1, h or 1, t, t).
      wanted: what the layer does within the documents that begin where a token does not see the
        one before it, (b or 1, t, t).
      right: queries that are the same in both, or padding, (b or 1, t).
    """
    row, query = (int(i) for i in np.argwhere(~right)[0])
    heads = seen[min(row, len(seen) - 1), :, query]
    here, there = heads[0], wanted[min(row, len(wanted) - 1), query]
    token = f"mask: token {query} of row {row}"
    if (heads != here).any():
        return f"{token} does not see the same in all heads"
    if here[query + 1 :].any():
        later = query + 1 + int(here[query + 1 :].argmax())
        return f"{token} sees token {later}, which is later: the mask is bidirectional"
    if not here[query]:
        return f"{token} does not see itself, and is no padding, which no token sees"
    hidden = np.flatnonzero(~here[: query + 1])
    first = int(here.argmax())
    if hidden[-1] > first:
        return f"{token} sees token {first} and not token {hidden[-1]}: the mask has a hole"
    missing = int((there & ~here).argmax())
    return f"{token} does not see token {missing}, as in a sliding window"


def head_agrees(seen: Any) -> Any:
    """Whether a query sees the same keys in all heads, (b, t), of ``seen`` (b, h, t, s)."""
    return (seen == seen[:, :1]).all(axis=(1, 3))


def causal(length: int, xp: Any) -> Any:
    """The causal mask, (1, t, t)."""
    return xp.tri(length, dtype=bool)[None]
