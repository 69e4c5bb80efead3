"""The lengths of a stream's ragged rows, from what a host says of which tokens see which."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from memcache_jax import _checks
from memcache_jax.nn import masks
from memcache_jax.nn.call_documents import (
    Call,
    after_first,
    document_begins,
    document_ends,
    known_arrays,
)


class _Sees(NamedTuple):
    """What the mask of a call with a cache tells of each token, (b, t), without its keys' places.

    Attributes:
      padding: the token does not see itself.
      count: keys that it sees.
      keeps: whether it sees all keys of the token before it.
      legible: whether all values are 0 or 1, in all heads the same.
    """

    padding: Any
    count: Any
    keeps: Any
    legible: Any


def ragged_rows(call: Call, shape: tuple[int, ...], position: Any) -> tuple[Any, Any, Any]:
    """How a call continues the rows of a cache, which have taken ``position`` tokens, (b,).

    Returns:
      Padding on the left of each row, (b,), or None; the number of tokens after it, (b,), or None
      for all; and whether a row continues, (b, 1), or None for all.
    """
    _checks.check_room(position, shape, None, None)
    xp, ids, positions = known_arrays(call, shape, position)
    length, position = shape[1], xp.asarray(position)[:, None]
    padding, sees = xp.zeros(shape, bool), None
    if ids is not None:
        padding = padding | (ids == 0)
    if positions is not None:
        padding = padding | (positions < 0)
    if call.mask is not None:
        sees = _read_mask(call, shape, xp)
        padding = padding | sees.padding

    begins = document_begins(shape, ids, positions, xp) | padding
    begins = begins | after_first(padding[:, :-1], xp)
    alone = begins & document_ends(begins, xp)
    # The row's tokens are the first document of several, or the last token that is no padding.
    several = (~alone).any(axis=1)
    last = length - 1 - xp.argmax(~padding[:, ::-1], axis=1)
    left = xp.where(several, xp.argmax(~alone, axis=1), last)
    number = xp.cumsum(begins, axis=1)
    taken = (number == xp.take_along_axis(number, left[:, None], axis=1)) & ~padding
    here = position + xp.arange(length)[None] - left[:, None]  # where a token comes in its row

    checks, others = {}, ~taken & ~padding
    if positions is not None:
        # Single tokens that do not go on from the row's are padding, unless ids say where that is.
        top = xp.where(taken, positions, 1).max(axis=1)[:, None]
        stray = others & (positions > top)
        checks["positions"] = xp.where(taken, positions == here, ~stray)
        others = others if ids is not None else others & ~alone
    if sees is not None:
        follows = (sees.count == here + 1) & (sees.keeps | (here <= position))
        checks["mask"] = ~taken | (sees.legible & follows)
    checks["documents"] = ~others
    lengths = taken.sum(axis=1)
    if xp is jnp:
        right = jnp.stack([check.all(axis=1) for check in checks.values()], axis=1)
        return left, lengths.astype(jnp.int32), right.all(axis=1, keepdims=True)
    _refuse(checks, positions, position, ids)
    if ids is not None and not ids.any():
        raise ValueError("segment_ids are all 0, which is padding: there is no token to take")
    lengths = None if (lengths == length).all() else jnp.asarray(lengths, jnp.int32)
    return left if left.any() else None, lengths, None


def _read_mask(call: Call, shape: tuple[int, ...], xp: Any) -> _Sees:
    mask = masks.read_mask(call.mask, shape, call.num_heads, keys=None, xp=xp)
    seen = mask.seen[:, 0]
    before, after = seen[:, :-1], seen[:, 1:]
    count = seen.sum(axis=2)
    nothing_new = after_first((before == after).all(axis=2), xp)
    keeps = after_first((~before | after).all(axis=2), xp)
    legible = mask.legible & masks.head_agrees(mask.seen)
    rows = (count == 0) | nothing_new, count, keeps, legible
    return _Sees(*(xp.broadcast_to(row, shape) for row in rows))


def _refuse(checks: dict[str, Any], positions: Any, position: Any, ids: Any) -> None:
    """Raises ValueError for the first check that does not hold everywhere."""
    for name, check in checks.items():
        if check.all():
            continue
        row = int((~check).any(axis=1).argmax())
        holds = int(position[row, 0])
        if name == "positions":
            raise ValueError(
                f"positions must count on from the {holds} tokens that row {row} of the cache "
                f"has, got {positions[row].tolist()}"
            )
        if name == "mask":
            token = int((~check[row]).argmax())
            raise ValueError(
                f"mask: with a cache, each token must see the tokens of its row so far and itself; "
                f"row {row} of the cache has {holds}, and token {token} of this call sees others"
            )
        got = "" if ids is None else f", got segment_ids {ids[row].tolist()}"
        raise ValueError(f"a cache holds one document per row{got} in row {row}")
