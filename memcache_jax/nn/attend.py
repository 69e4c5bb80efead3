"""Softmax attention of rotated queries and keys, in one pass and over a stream's cache."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax import _checks
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.nn import spoilt
from memcache_jax.nn.windows import attend_window, block_size
from memcache_jax.sharding.division import Division
from memcache_jax.streaming.protocol import MixerCache
from memcache_jax.streaming.rewind import more_rewindable, taken_back

Turn: TypeAlias = Callable[[Array, Array | None], Array]
"""Rotates rows (b, t, h, k) by their positions (b, t); None: each counts from its row's first."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache(MixerCache):
    """Keys and values that later tokens see: all so far, or the last ones for a window.

    Attributes:
      key: (b, h, past, k), contiguous per head, as reads go through them.
      value: likewise; None where values are the keys.
      position: tokens taken so far by each row, (b,).
      rewindable: by how many tokens each row can go back, (b,); None where none can.
      first: this layer's number in a stack of layers, which share keys and values.
      rewind_most: by how many tokens a row can go back; a window keeps as many more.
      is_window: whether the last ones alone are kept, the newest at the end.
    """

    key: Any
    value: Any
    position: Any
    rewindable: Any = None
    first: Any = None
    rewind_most: int = dataclasses.field(default=0, metadata=dict(static=True))
    is_window: bool = dataclasses.field(default=False, metadata=dict(static=True))

    shared = ("key", "value")
    small = zeroed = ("position", "rewindable")
    axes: ClassVar = {"key": "b h", "value": "b h"}

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Number of heads, and their dimension."""
        return self.key.shape[-3::2]

    def rewound(self, tokens: Int[Array, "b"]) -> "AttentionCache":
        """As ``MixerCache.rewound``."""
        position, rewindable = taken_back(self.position, self.rewindable, tokens)
        back, past = jnp.where(position < self.position, tokens, 0), self.key.shape[-2]

        def moved(shared: Array) -> Array:
            """The rows of a window, each moved by the tokens that go."""
            rows = self.own_rows(shared)
            place = jnp.arange(past)[None] - back[:, None]
            kept = jnp.take_along_axis(rows, jnp.maximum(place, 0)[:, None, :, None], axis=2)
            return self.put_rows(shared, jnp.where((place >= 0)[:, None, :, None], kept, 0))

        def emptied(shared: Array) -> Array:
            """All rows, with zeros in place of the tokens that go: NaN would stay in sums."""
            ago = jnp.arange(1, 1 + self.rewind_most)[None]
            place = jnp.where(ago <= back[:, None], self.position[:, None] - ago, past)
            layer = () if self.first is None else (self.first,)
            rows = jnp.arange(len(place))[:, None]
            return shared.at[*layer, rows, :, place].set(0, mode="drop")

        change = moved if self.is_window else emptied
        key, value = jax.tree.map(change, (self.key, self.value))
        return self.replace(key=key, value=value, position=position, rewindable=rewindable)

    def borders(self, length: int) -> np.ndarray:
        """As ``MixerCache.borders``: all, without a window."""
        if self.is_window:
            raise ValueError(
                "cannot return to a segment's begin: attention to a window keeps its last tokens "
                "alone; a PrefixStore keeps caches"
            )
        return np.arange(length + 1)

    def returned(
        self, position: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple["AttentionCache", Bool[Array, "b"]]:
        """As ``MixerCache.returned``."""
        position = jnp.where(rows, position, self.position)
        goes = rows[:, None] & (jnp.arange(self.key.shape[-2])[None] >= position[:, None])

        def emptied(shared: Array) -> Array:
            return self.put_rows(
                shared, jnp.where(goes[:, None, :, None], 0, self.own_rows(shared))
            )

        key, value = jax.tree.map(emptied, (self.key, self.value))
        back = None if self.rewindable is None else jnp.where(rows, 0, self.rewindable)
        changed = self.replace(key=key, value=value, position=position, rewindable=back)
        return changed, jnp.ones_like(rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedCache(AttentionCache):
    """Rows that are keys and values of all heads, (b, 1, past, c): a mesh divides no head of them.

    The queries' heads it may divide.
    """

    axes: ClassVar = {}


def attend_causally(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t g k"],
    value: Float[Array, "b t g k"],
    document: Int[Array, "b t"] | None,
    mask: Bool[Array, "_ _ t s"] | None = None,
    *,
    window: int | None,
    turn: Turn,
    implementation: Literal["xla", "cudnn"] | None,
    division: Division | None = None,
) -> Float[Array, "b t h k"]:
    """Attention of each token to itself and those before it, within ``window`` and its document.

    Each head of keys serves as many heads of queries. ``turn`` rotates queries and keys by their
    positions. A mask takes away more. Within a ``shard_map`` that divides time, the tokens are one
    part; keys and values of all parts are gathered.
    """
    parts, length = 1 if division is None else division.parts, query.shape[1]
    options: dict[str, Any] = dict(implementation=implementation)
    first: Any = 0
    if division is not None and parts > 1:
        first = lax.axis_index(division.time_axis) * length
    position = first + jnp.arange(length)
    place = None if parts == 1 else position[None]
    query, key = (turn(rows, place) for rows in (query, key))
    every = document
    if division is not None and parts > 1:
        gather = functools.partial(lax.all_gather, axis_name=division.time_axis, tiled=True)
        key, value = (gather(rows, axis=1) for rows in (key, value))
        every = None if document is None else gather(document, axis=1)

    if (
        window is not None
        and implementation != "cudnn"
        and (parts > 1 or block_size(window, length) < length)
    ):
        past = min(window - 1, parts * length)

        def near(x: Array | None, axis: int = 1) -> Any:
            """The last tokens before ours, then ours."""
            if x is None:
                return None
            x = jnp.pad(x, [(past * (i == axis), 0) for i in range(x.ndim)])
            return lax.dynamic_slice_in_dim(x, first, past + length, axis)

        before = jnp.minimum(first, past)[None]
        rows = query, near(key), near(value), before, near(every), near(mask, axis=3)
        return attend_window(*rows, window=window, **options)
    key, value, bad = spoilt.cleaned(key, value, query.shape[2])
    plain = parts == 1 and mask is None
    if document is not None and every is not None:
        mask = _both(_same(document, every), mask)
    if plain:
        lost = spoilt.by_place(bad, document, window)
    else:
        ago = position[:, None] - jnp.arange(parts * length)[None]
        seen = _both(((ago >= 0) & (window is None or ago < window))[None, None], mask)
        lost = spoilt.by_mask(seen, bad)
        mask = mask if parts == 1 else seen
    if parts == 1:
        options |= dict(
            is_causal=True, local_window_size=None if window is None else (window - 1, 0)
        )
    y = jax.nn.dot_product_attention(query, key, value, mask=mask, **options)
    return jnp.where(lost[..., None], jnp.nan, y)


def _both(seen: Bool[Array, "_ _ t s"], mask: Bool[Array, "_ _ t s"] | None) -> Array:
    return seen if mask is None else seen & mask


def _same(document: Int[Array, "b t"], other: Int[Array, "b s"]) -> Bool[Array, "b 1 t s"]:
    return document[:, None, :, None] == other[:, None, None, :]


def attend_stream(
    cache: AttentionCache,
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t g kk"],
    value: Float[Array, "b t g kk"] | None,
    lengths: Int[Array, "b"],
    persistent: tuple[Array, Array] | None = None,
    *,
    window: int | None,
    turn: Turn,
) -> tuple[Float[Array, "b t h k"], AttentionCache]:
    """Attention of the next tokens to the past and to themselves; the cache after them.

    Without values, keys are what is read. With ``persistent`` keys and values, as in
    ``attend_window``, windows do not slide, but begin at multiples of ``window``.
    """
    (batch, length), past = query.shape[:2], cache.key.shape[-2]
    past = past if window is None else window - 1  # of which more are kept, to go back
    place = cache.position[:, None] + jnp.arange(length)[None]
    query, key = (turn(rows, place) for rows in (query, key))
    most = past if window is None else _checks.LARGEST
    token = jnp.arange(length)[None]
    counts, fits = token < lengths[:, None], token < most - cache.position[:, None]
    rows = (key,) if value is None else (key, value)
    olds = cache.states[: len(rows)]
    if window is None:
        # Tokens that do not count are put out of range, and dropped.
        there = jnp.where(counts & fits, place, past)
        layer = () if cache.first is None else (cache.first,)
        place_of = *layer, jnp.arange(batch)[:, None], slice(None), there
        kept = tuple(
            old.at[place_of].set(new.astype(old.dtype), mode="drop")
            for old, new in zip(olds, rows, strict=True)
        )
        own = [cache.own_rows(row) for row in kept]
        keys, values = own[0], own[-1]
        seen = jnp.arange(past)[None, None] <= place[..., None]
        y = _attend(query, keys, values, seen[:, None])
    else:
        old = map(cache.own_rows, olds)
        new = (jnp.moveaxis(x, 2, 1) for x in rows)
        joined = [jnp.concatenate(pair, axis=2) for pair in zip(old, new, strict=True)]
        older = cache.key.shape[-2] - past
        keys, values = joined[0][:, :, older:], joined[-1][:, :, older:]
        before = jnp.minimum(cache.position, past)
        if persistent is not None or block_size(window, length) < length:
            near, nearby = (jnp.moveaxis(x, 1, 2).astype(query.dtype) for x in (keys, values))
            number = None
            if persistent is not None:
                number = (cache.position[:, None] + jnp.arange(-past, length)[None]) // window
            how: dict[str, Any] = dict(window=window, persistent=persistent)
            y = attend_window(query, near, nearby, before, number, **how)
        else:
            there = jnp.arange(past + length)[None]
            ago = past + jnp.arange(length)[:, None] - there
            seen = ((ago >= 0) & (ago < window))[None] & (there >= past - before[:, None])[:, None]
            y = _attend(query, keys, values, seen[:, None])
        size = older + past
        last = jax.vmap(lambda row, begin: lax.dynamic_slice_in_dim(row, begin, size, axis=1))
        kept = tuple(
            cache.put_rows(old, last(row, lengths)) for old, row in zip(olds, joined, strict=True)
        )
    y = jnp.where((counts & ~fits)[..., None, None], jnp.nan, y)
    return y, cache.replace(
        **dict(zip(("key", "value"), kept, strict=False)),
        position=_checks.advanced(cache.position, lengths),
        rewindable=more_rewindable(cache.rewindable, lengths, cache.rewind_most),
    )


def _attend(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b g s k"],
    value: Float[Array, "b g s k"],
    seen: Bool[Array, "b 1 t s"],
) -> Float[Array, "b t h k"]:
    """Attention over heads-first keys, which ``jax.nn.dot_product_attention`` would transpose."""
    key, value, bad = key.astype(query.dtype), value.astype(query.dtype), None
    if query.shape[1] > 1:  # one token sees all that there are
        key, value = (jnp.moveaxis(x, 1, 2) for x in (key, value))
        key, value, bad = spoilt.cleaned(key, value, query.shape[2])
        key, value = (jnp.moveaxis(x, 2, 1) for x in (key, value))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    batch, length, heads, dim = query.shape
    rows = query.reshape(batch, length, key.shape[1], -1, dim)
    scores = jnp.einsum("btgrk,bgsk->bgrts", rows, key, preferred_element_type=wide)
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores * dim**-0.5, -jnp.inf))
    y = jnp.einsum("bgrts,bgsk->btgrk", weights.astype(value.dtype), value)
    y = y.reshape(batch, length, heads, dim)
    return y if bad is None else jnp.where(spoilt.by_mask(seen, bad)[..., None], jnp.nan, y)
