"""Calls as hosts make them: what the arguments of an attention layer mean to a recurrent one.

Everything here says which tokens see which. A memory can follow that where it is causal within
documents, so each argument becomes the documents of a row, ``document_ids``, or the lengths of a
ragged row in a stream.
"""

import functools
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from memcache_jax import _checks
from memcache_jax._typing import Array
from memcache_jax.nn import masks
from memcache_jax.nn.call_documents import Call, documents, documents_and_mask
from memcache_jax.nn.call_lengths import ragged_rows
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import axes_of, by_compiler, like

_ARRAYS = ("document_ids", "segment_ids", "positions", "mask")


class ModelCall(TypedDict, total=False):
    """Keywords by which hosts tell which tokens see which.

    Each only takes away: a token sees what all of them let it see, and never a later one. Values
    that are traced under ``jit`` cannot be looked at, so that what would be an error gives NaN in
    the outputs of those tokens, or, with a cache, of those rows. Outputs of padding mean nothing.

    Attributes:
      segment_ids: another name of ``document_ids``, (b, t). Padding, 0 by the convention of
        MaxText and Tunix, is a document of its own. With a cache, tokens of segment 0 are not
        taken, and the others must be one segment.
      positions: integers (b, t) or (t,). A document begins where one is not the previous plus one,
        and after a negative one. Padding on the left, such as 0, 0, 0, 1, 2 or -1, -1, 0, 1, 2 or
        1, 1, 0, 1, 2, leaves the outputs of a row's tokens as they are without it. With a cache,
        positions must count on from the tokens that the row has; padding, on the left or as
        0, 1, 2, 2, 2 on the right, is not taken, and a row of one position over and over has its
        token last.
      mask: booleans, or 0 and 1, that broadcast to (b, h, t, t), also without the axis of heads or
        of the batch: what a query sees. A document begins at t where mask[t, t - 1] is 0. Padding
        is what no token sees, itself included; its own row may be anything. All else must be
        causal within the documents, in all heads alike. ``Attention`` takes any mask without later
        tokens. With a cache, (b, t, keys): each query must see as many keys as its row has tokens
        by then, those of the query before among them.
      deterministic: without effect, for there is no dropout.
    """

    segment_ids: Any
    positions: Any
    mask: Any
    deterministic: Any


class MixerCall(ModelCall, total=False):
    """Keywords of ``nnx.MultiHeadAttention`` beside those of ``ModelCall``.

    Attributes:
      inputs_q: the input, where it is given by this name.
      inputs_k: None or the input itself; also as the second positional argument. Rows of another
        traced value have outputs of NaN.
      inputs_v: likewise, also as the third.
      is_causal: True lets the mask be one of padding alone; the layer is causal without it too.
      decode: None or False; streams go through ``cache``.
      sow_weights: False.
      rngs: without effect, for there is no dropout.
      out_sharding: None.
      qkv_sharding: None.
    """

    inputs_q: Any
    inputs_k: Any
    is_causal: Any
    decode: Any
    sow_weights: Any
    rngs: Any
    out_sharding: Any
    qkv_sharding: Any


def read_mixer_call(
    x: Any,
    document_ids: Any,
    inputs_v: Any,
    num_heads: int,
    in_features: int,
    *,
    inputs_q: Any = None,
    inputs_k: Any = None,
    is_causal: Any = None,
    decode: Any = None,
    sow_weights: Any = False,
    rngs: Any = None,
    out_sharding: Any = None,
    qkv_sharding: Any = None,
    **call: Any,
) -> tuple[Array, Call]:
    """Returns a layer's input and its call, or raises ValueError for what it does not do."""
    del rngs
    if (x is None) == (inputs_q is None):
        raise ValueError(
            "give the input once, as the first argument or as inputs_q, got "
            f"{'neither' if x is None else 'both'}"
        )
    x = inputs_q if x is None else x
    if document_ids is not None and len(_checks.check_array("document_ids", document_ids)[0]) == 3:
        inputs_k, document_ids = document_ids, None  # as hosts call attention: attn(x, x)
    for name, inputs in (("inputs_k", inputs_k), ("inputs_v", inputs_v)):
        if inputs is not None and inputs is not x:
            x = _only_same(name, inputs, x)
    for name, flag in (("decode", decode), ("sow_weights", sow_weights), ("is_causal", is_causal)):
        if flag is not None:
            _checks.check_flag(name, flag)
    if decode:
        raise ValueError("decode=True is not for this layer: pass cache=layer.init_cache(...)")
    if sow_weights:
        raise ValueError("sow_weights=True is not for this layer, which keeps no attention weights")
    for name, sharding in (("out_sharding", out_sharding), ("qkv_sharding", qkv_sharding)):
        if sharding is not None:
            raise ValueError(f"{name} is not for this layer, which is laid out by jax.set_mesh")
    if is_causal is not None and not is_causal and call.get("mask") is None:
        raise ValueError("is_causal=False is not for this layer, which is causal")
    _checks.check_input(x, in_features)
    read = read_call(x.shape[:2], document_ids, num_heads=num_heads, **call)
    return x, read._replace(is_causal=bool(is_causal))


def _only_same(name: str, inputs: Array, x: Array) -> Array:
    """``x`` where ``inputs`` are the same, or ValueError; traced rows with another value are NaN.

    Under ``jax.checkpoint`` one array that was given twice is two.
    """
    if _checks.check_array(name, inputs)[0] == jnp.shape(x) and jnp.ndim(x) == 3:
        other = like(x, jnp.asarray(inputs))
        same = jnp.all((other == x) | (jnp.isnan(other) & jnp.isnan(x)), axis=(1, 2))
        if isinstance(same, Tracer):
            return jnp.where(same[:, None, None], x, jnp.nan)
        if same.all():
            return x
    raise ValueError(
        f"{name} must be None or the input itself, got another array of shape "
        f"{jnp.shape(inputs)}: the layer has no cross-attention"
    )


def read_call(
    shape: tuple[int, ...],
    document_ids: Any,
    *,
    segment_ids: Any = None,
    positions: Any = None,
    mask: Any = None,
    deterministic: Any = None,
    num_heads: int = 1,
) -> Call:
    """Returns a call on tokens of shape (b, t), or raises ValueError for arrays that do not fit."""
    del deterministic
    if document_ids is not None and segment_ids is not None:
        raise ValueError("document_ids and segment_ids are the same: give one of them, got both")
    if document_ids is not None:
        _checks.check_documents(document_ids, shape)
    if segment_ids is not None:
        _checks.check_documents(segment_ids, shape, "segment_ids")
    if positions is not None:
        of_positions, dtype = _checks.check_array("positions", positions)
        integers = jnp.issubdtype(dtype, jnp.integer)
        if of_positions not in (shape, (1, shape[1]), shape[1:]) or not integers:
            raise ValueError(
                f"positions must be integers of shape (b, t) = {shape} or (t,), got "
                f"{dtype} {of_positions}"
            )
    if mask is not None:
        _checks.check_array("mask", mask)
    return Call(document_ids, segment_ids, positions, mask, num_heads=num_heads)


def answer(
    call: Call,
    x: Array,
    cache: Any,
    *,
    whole: Callable[..., Any],
    extend: Callable[..., Any],
    takes_masks: bool = False,
) -> Any:
    """Answers a call with a layer or a model.

    Args:
      call: from ``read_call``.
      x: the input, (b, t) or (b, t, d).
      cache: continues a stream; None for whole rows.
      whole: ``whole(x, document_ids)`` returns the outputs of whole rows, or
        ``whole(x, document_ids, mask)`` with a mask (b or 1, h or 1, t, t) of booleans if
        ``takes_masks``.
      extend: ``extend(x, cache, lengths)`` returns the outputs of the next tokens of a stream, and
        the next cache.
      takes_masks: whether the layer can follow any mask that shows no later tokens.

    Raises:
      ValueError: for known values that the layer does not follow.
    """
    if cache is not None and call.document_ids is not None:
        raise ValueError("a cache holds one document per row: give no document_ids")
    if 0 in x.shape[:2]:
        y = whole(x, None)
        return y if cache is None else (y, cache)
    if cache is not None:
        if call.ids is None and call.positions is None and call.mask is None:
            return extend(x, cache, None)
        left, lengths, right = _by_rows(ragged_rows, call, x, cache.position)
        y, cache = extend(_roll(x, left), cache, lengths)
        return _only(right, _roll(y, left, back=True)), cache
    if call.positions is None and call.mask is None:
        return whole(x, None if call.ids is None else jnp.asarray(call.ids))
    if takes_masks:
        ids, mask, right = _by_rows(documents_and_mask, call, x)
        return _only(right, whole(x, ids, mask))
    ids, left, right = _by_rows(documents, call, x)
    y = whole(_roll(x, left), ids if ids is None else _roll(ids, left))
    return _only(right, _roll(y, left, back=True))


def _by_rows(read: Callable[..., Any], call: Call, x: Array, *others: Array) -> Any:
    """``read(call, (b, t), *others)``, on each device for its own rows."""
    (batch, length), division = x.shape[:2], Division.of((x, "b"))
    arrays = call.document_ids, call.segment_ids, call.positions, call.mask
    if division is None or not division.is_explicit or masks.known(*arrays, *others):
        return read(call, (batch, length), *others)
    positions, mask = call.positions, call.mask
    if positions is not None:
        positions = jnp.broadcast_to(positions, (batch, length))
    if mask is not None:
        mask = masks.four_axes(jnp.asarray(mask), batch, call.num_heads)
        mask = jnp.broadcast_to(mask, (batch, *mask.shape[1:]))

    def local(arrays: tuple, others: tuple) -> Any:
        own = call._replace(**dict(zip(_ARRAYS, arrays, strict=True)))
        rows = len(jax.tree.leaves(arrays)[0])
        return read(own, (rows, length), *others)

    arrays = call.document_ids, call.segment_ids, positions, mask
    return division.run(local, (arrays, others), ("b", "b"), "b")


def _roll(x: Array, left: Any, *, back: bool = False) -> Array:
    """Moves the first ``left`` tokens of each row to its end, or back."""
    if left is None:
        return x

    def rolled(x: Array, left: Array) -> Array:
        place = jnp.arange(x.shape[1])[None] + (-left if back else left)[:, None]
        place = (place % x.shape[1]).reshape(*place.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, place, axis=1)

    if isinstance(left, np.ndarray):
        left = jnp.asarray(left)
        return by_compiler(rolled, x, left, axes=axes_of(x))
    # Rows without padding, most of them, are not copied.
    division = Division.of((x, "b"))
    if division is None or not division.is_explicit:
        return lax.cond(left.any(), functools.partial(rolled, left=left), lambda x: x, x)
    return like(x, division.run(rolled, (x, left), ("b", "b"), "b"))


def _only(right: Any, y: Array) -> Array:
    """NaN for tokens, or rows, that are not right."""
    return y if right is None else jnp.where(right[..., None], y, jnp.nan)
