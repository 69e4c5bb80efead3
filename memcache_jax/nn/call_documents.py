"""The documents of whole rows, from what a host says of which tokens see which.

Where all values are known this is NumPy's work, and what cannot be followed is a ValueError. Where
some are traced it is JAX's, and tells which tokens are right.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from memcache_jax.nn import masks


class Call(NamedTuple):
    """What a host says of the tokens' sight; None where it says nothing."""

    document_ids: Any
    segment_ids: Any
    positions: Any
    mask: Any
    is_causal: bool = False
    num_heads: int = 1

    @property
    def ids(self) -> Any:
        """The documents' ids, by whichever name."""
        return self.segment_ids if self.document_ids is None else self.document_ids


def documents(call: Call, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Each token's document; a row's padding on the left; the tokens whose mask is followed."""
    xp, ids, positions = known_arrays(call, shape)
    length, right = shape[1], None
    begins = document_begins(shape, ids, positions, xp)
    if call.mask is not None:
        seen, legible = _seen(call, shape, begins, xp)
        sees_previous = xp.diagonal(seen[:, 0], offset=-1, axis1=1, axis2=2)
        begins = begins | after_first(~sees_previous, xp)
        wanted = masks.causal(length, xp) & _same(begins)
        followed = masks.head_agrees(seen) & (seen[:, 0] == wanted).all(axis=2)
        right = legible & (masks.padding_tokens(seen, xp) | followed)
        if xp is np:
            if not right.all():
                raise ValueError(
                    f"{masks.explain(seen, wanted, right)}; a memory follows causal masks, of "
                    "documents and padding too"
                )
            right = None
    # What stands alone before a row's first document is padding, or the same wherever it stands.
    alone = begins & document_ends(begins, xp)
    left = xp.cumprod(alone, axis=1).sum(axis=1) % length
    document = jnp.asarray(xp.broadcast_to(xp.cumsum(begins, axis=1), shape), jnp.int32)
    left = xp.broadcast_to(left, shape[:1])
    if xp is np:
        left = left if left.any() else None
        return document if begins[:, 1:].any() else None, left, right
    return document, left, right


def documents_and_mask(call: Call, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Each token's document, the mask, and the tokens that see no later ones in it."""
    xp, ids, positions = known_arrays(call, shape)
    begins, seen, right = document_begins(shape, ids, positions, xp), None, None
    if call.mask is not None:
        seen, legible = _seen(call, shape, begins, xp)
        wanted = seen & masks.causal(shape[1], xp)[:, None]
        right = legible & (masks.padding_tokens(seen, xp) | (seen == wanted).all(axis=(1, 3)))
        if xp is np and not right.all():
            raise ValueError(
                masks.explain(seen.any(axis=1, keepdims=True), wanted.any(axis=1), right)
            )
        right, seen = None if xp is np else right, jnp.asarray(seen)
    document = jnp.asarray(xp.cumsum(begins, axis=1), jnp.int32)
    return document if xp is jnp or begins[:, 1:].any() else None, seen, right


def known_arrays(call: Call, shape: tuple[int, ...], *others: Any) -> tuple[Any, Any, Any]:
    """NumPy where all values are known and JAX's otherwise, and its ids and positions (b, t)."""
    xp = np if masks.known(call.ids, call.positions, call.mask, *others) else jnp
    ids = None if call.ids is None else xp.asarray(call.ids)
    positions = call.positions
    if positions is not None:
        positions = xp.asarray(positions)
        positions = positions[None] if positions.ndim == 1 else positions
        positions = xp.broadcast_to(positions, shape)
    return xp, ids, positions


def _seen(call: Call, shape: tuple[int, ...], begins: Any, xp: Any) -> masks.Mask:
    """The mask within documents that begin here, and before later tokens if it is said so."""
    length = shape[1]
    mask = masks.read_mask(call.mask, shape, call.num_heads, keys=length, xp=xp)
    seen = mask.seen
    if call.is_causal:
        seen = seen & masks.causal(length, xp)[:, None]
    if call.ids is not None or call.positions is not None:
        seen = seen & _same(begins)[:, None]
    return mask._replace(seen=seen)


def document_begins(shape: tuple[int, ...], ids: Any, positions: Any, xp: Any) -> Any:
    """Whether a document begins at a token, (b, t)."""
    later = xp.zeros((shape[0], shape[1] - 1), bool)
    if ids is not None:
        later = later | (ids[:, 1:] != ids[:, :-1])
    if positions is not None:
        before = positions[:, :-1]
        later = later | (positions[:, 1:] != before + 1) | (before < 0)
    return after_first(later, xp, True)


def after_first(later: Any, xp: Any, value: bool = False) -> Any:
    """Puts a column before those of the later tokens."""
    return xp.concatenate([xp.full((len(later), 1), value), later], axis=1)


def document_ends(begins: Any, xp: Any) -> Any:
    """Whether a document ends with a token."""
    return xp.concatenate([begins[:, 1:], xp.ones((len(begins), 1), bool)], axis=1)


def _same(begins: Any) -> Any:
    """Whether two tokens are of one document, (b, t, t)."""
    document = begins.cumsum(axis=1)
    return document[:, :, None] == document[:, None]
