"""A piece of a stream, tokens of one chunk: the engine's layout over a cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax import _checks
from memcache_jax._typing import Array, Bool, Float, Int, State
from memcache_jax.choice import choice_of
from memcache_jax.engine.finite import cleaned, composed, spoil
from memcache_jax.engine.read import Bank
from memcache_jax.engine.run import Layout, needs_of, run
from memcache_jax.engine.types import (
    Blocks,
    Candidates,
    Keys,
    Rows,
    Tokens,
    Views,
    Writing,
)
from memcache_jax.engine.write import extended, write_chunk
from memcache_jax.memories import Memory
from memcache_jax.memories.base import Run
from memcache_jax.memories.pending import Pending
from memcache_jax.sparse import SSC
from memcache_jax.streaming.bank import SlotBank
from memcache_jax.streaming.cache import Cache
from memcache_jax.streaming.deferred import emptied, pending_with, reset, settle
from memcache_jax.streaming.exact import exact_of, remember
from memcache_jax.streaming.measures import measured
from memcache_jax.streaming.past import (
    remember_chunk,
    remember_token,
    remember_tokens,
    remember_writes,
)
from memcache_jax.streaming.spans import check_pooling, span_keys, sums_of
from memcache_jax.streaming.store import once_read, store


def take_piece(
    cache: Cache,
    piece: Tokens,
    active: Bool[Array, "b"],
    counts: Int[Array, "b"] | None = None,
    hands_on: bool = False,
) -> tuple[Cache, tuple[Float[Array, "b h m v"], Float[Array, "b h m u"] | None]]:
    """Takes tokens (b, h, m, ...) of one chunk.

    With ``counts``, active rows take only that many of them. Those of deep memories stay pending.

    Returns:
      The cache after them; and their outputs, with what they chose if SSC ``hands_on`` that.
    """
    config, slots = cache.config, cache.config.slots
    memory, aggregation, segment = config.memory, config.aggregation, config.segmentation.size
    size = piece.key.shape[2]
    taken, counted = jnp.where(active, size if counts is None else counts, 0), active[:, None]
    taken = taken.astype(cache.position.dtype)
    if counts is not None:
        counted = jnp.arange(size)[None] < taken[:, None]
        piece = _without_writes(piece, ~counted)
    block, into_block = jnp.divmod(cache.position, segment)
    back, before = config.goes_back and (size == 1 or counts is not None), cache
    if config.rewind:
        past = remember_token(cache, active) if back and size == 1 else cache.past
        more = jnp.minimum(cache.rewindable + taken, config.rewind) if back else 0
        rewindable = jnp.where(active, more, cache.rewindable)
        cache = dataclasses.replace(cache, past=past, rewindable=rewindable)
    defers = config.defers and (size == 1 or counts is not None)
    cache = _restarted(cache, block, into_block, active)

    tokens, bad = cleaned(jax.tree.map(lambda x: x[:, :, None], piece))
    rows = Rows(tokens.query, tokens.key, tokens.value, tokens.controls, bad=bad)
    rows = jax.tree.map(lambda x: x[:, :, None], rows)
    how = Writing(memory, needs_of(aggregation, memory), lambda shape: None, None)
    how = how.with_maps(config.composes)
    record = measured(cache, how, tokens, rows, counted)
    layout = Piece(cache, block, taken if defers or counts is not None else None)
    y, ends, selection, _ = run(layout, how, aggregation, Blocks(tokens, None, rows, tokens.key))
    y, chosen = y[:, :, 0], None
    if hands_on:
        assert isinstance(aggregation, SSC)
        chosen = choice_of(selection, aggregation.top_k)[:, :, 0]

    complete = ended = active & (into_block + taken == segment)
    if config.max_length is not None:
        # Tokens beyond a row's room give NaN, and what they write is dropped.
        left = config.max_length - cache.position
        inside = jnp.arange(size)[None] < left[:, None]
        y, complete = jnp.where(inside[:, None, :, None], y, jnp.nan), complete & (taken <= left)
    keep = functools.partial(_where, active[:, None])
    if back and size > 1:
        each = cache.key_sum[:, :, :, None] + jnp.cumsum(piece.key, axis=2)[:, :, None]
        last = jnp.maximum(taken - 1, 0)[:, None, None, None, None]
        sums = jnp.take_along_axis(each, last, axis=3)[:, :, :, 0]
        if defers:
            past = remember_tokens(before, ends.transition, each, taken)
        else:
            write = functools.partial(_with_token, layout, how.with_no_reads(), rows)
            run_before = Run(cache.state, cache.transition)
            ends, past = remember_writes(before, run_before, write, each, taken)
        cache = dataclasses.replace(cache, past=past)
    else:
        sums = cache.key_sum + sums_of(cache, block, piece.key)
    if defers:
        cache = _with_pending(cache, ends.state, taken, after=y)
    else:
        ends = jax.tree.map(keep, ends, Run(cache.state, cache.transition))
        several = slots.num_tracks > 1 and config.composes
        state = _followed(memory, ends, complete) if several else ends.state
        cache = dataclasses.replace(cache, state=state, transition=ends.transition)
    cache = dataclasses.replace(
        cache,
        position=_checks.advanced(cache.position, taken),
        key_sum=keep(sums, cache.key_sum),
        record=slots.count_reads(record, selection, counted),
        recent=remember(cache, tokens, bad, counted),
    )
    keeps = ended if back else None
    return store(cache, block, complete, after=y, keeps=keeps), (y, chosen)


def _without_writes(tokens: Tokens, others: Bool[Array, "b m"]) -> Tokens:
    """Tokens (b, h, m, ...) with zeros in place of keys, values and controls of the marked ones."""

    def clean(x: Array) -> Array:
        return jnp.where(others.reshape(len(x), 1, -1, *[1] * (x.ndim - 3)), 0, x)

    written = jax.tree.map(clean, (tokens.key, tokens.value, tokens.controls))
    return tokens._replace(**dict(zip(("key", "value", "controls"), written, strict=True)))


def _with_token(layout: "Piece", how: Writing, rows: Rows, run: Run, i: Array) -> Run:
    """The cache's runs after token i of rows (b, h, 1, 1, m, ...)."""
    cache = dataclasses.replace(layout.cache, state=run.state, transition=run.transition)
    token = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i, 1, axis=4), rows)
    return dataclasses.replace(layout, cache=cache, counts=None).write(how, token)[0]


def _restarted(
    cache: Cache, block: Int[Array, "b"], into_block: Int[Array, "b"], active: Bool[Array, "b"]
) -> Cache:
    """The cache after resetting the runs and chunks that begin with an active row's next token."""
    config, memory = cache.config, cache.config.memory
    begins = (active & (into_block == 0))[:, None] & config.slots.begins(cache.record, block)
    restart = begins if config.start == "independent" else (active & (cache.position == 0))[:, None]

    state, anchor, pending, transition = (
        *(cache.state, cache.anchor, cache.pending),
        cache.transition,
    )
    anew = active & (cache.position % (memory.gradient_chunk or 1) == 0)
    if pending is None:  # each token writes the state anyway, and these selects along with it
        state = _reset(state, restart, cache.initial)
    else:
        state = reset(state, restart, cache.initial)
        pending = emptied(memory, cache.initial, pending, anew)
    if anchor is not None:
        anchor = jax.tree.map(functools.partial(_where, anew[:, None]), state, anchor)
    if config.composes:
        identity = memory.identity(cache.key_sum.shape[-1], cache.key_sum.dtype)
        identity = jax.tree.map(lambda x: x[None], identity)
        transition = _reset(transition, begins[:, :1], identity)
    key_sum = _where(begins, jnp.zeros_like(cache.key_sum), cache.key_sum)
    return dataclasses.replace(
        cache, state=state, anchor=anchor, pending=pending, key_sum=key_sum, transition=transition
    )


def _reset(state: Any, restart: Bool[Array, "b tracks"], initial: Any) -> Any:
    """Arrays (b, h, tracks, ...), with the marked tracks reset to the initial ones, (h, ...)."""
    return jax.tree.map(
        lambda old, new: _where(restart, jnp.broadcast_to(new[None, :, None], old.shape), old),
        state,
        initial,
    )


def _with_pending(cache: Cache, pending: Pending, taken: Int[Array, "b"], after: Array) -> Cache:
    """The cache with ``taken`` more tokens in its chunk, written if that is then complete."""
    memory: Any = cache.config.memory
    chunk = memory.chunk_size
    complete = once_read(after, (taken > 0) & (cache.position % chunk + taken == chunk))
    cache = dataclasses.replace(cache, pending=pending)
    if cache.config.goes_back:
        past, complete = remember_chunk(cache, complete)
        cache = dataclasses.replace(cache, past=past)
    state = settle(memory, cache.state, cache.pending, complete)
    return dataclasses.replace(cache, state=state)


def _followed(memory: Memory, ends: Run, complete: Bool[Array, "b"]) -> State:
    """The states of all tracks: where a block is complete, track 0's run continues the others."""

    def follow(ends: Run) -> State:
        state, transition = jax.tree.map(lambda x: x[:, :, 0], ends)
        of_head = jax.vmap(lambda first, then: composed(memory, Run(first, None), then), (0, None))
        before = jax.tree.map(lambda x: x[:, :, 1:], ends.state)
        after = jax.vmap(jax.vmap(of_head))(before, Run(state, transition)).state
        after = jax.tree.map(lambda x, y: jnp.concatenate([x[:, :, None], y], 2), state, after)
        return jax.tree.map(functools.partial(_where, complete[:, None]), after, ends.state)

    return lax.cond(complete.any(), follow, lambda ends: ends.state, ends)


@dataclasses.dataclass(frozen=True)
class Piece(Layout):
    """Tokens that continue a cache: one block (b, h, 1, m, ...) of one chunk.

    Attributes:
      cache: from ``_restarted``.
      block: each row's block of the sequence.
      counts: how many of the tokens each row takes, if they are not a whole chunk or stay pending;
        the others are zeros. Else None.
    """

    cache: Cache
    block: Int[Array, "b"]
    counts: Int[Array, "b"] | None

    def write(self, how: Writing, rows: Rows) -> tuple[Run, Views]:
        """Writes the tokens into all tracks, of which only track 0, the live one, is read.

        If runs compose, the others are updated once the block is complete. If tokens of a deep
        memory stay pending, the returned runs hold ``Cache.pending`` instead of states, and the
        shares after each token instead of maps.
        """
        if self.cache.config.defers and self.counts is not None:
            pending, kept, each = pending_with(how, self.cache, rows, self.counts)
            return Run(pending, each), kept
        chunk = jax.tree.map(lambda x: x[:, :, 0, 0], rows._replace(bad=None))
        states = self.cache.state, self.cache.anchor

        def write(how: Writing, state: State, anchor: State, rows: Rows) -> tuple[State, Views]:
            return write_chunk(how, state, state if anchor is None else anchor, rows)

        live = jax.vmap(jax.vmap(functools.partial(write, how)))
        state, anchor = jax.tree.map(lambda x: x[:, :, 0], states)
        first, kept = live(state, anchor, chunk)
        ends, transition = jax.tree.map(lambda x: x[:, :, None], first), self.cache.transition
        later, anchors = (jax.tree.map(lambda x: x[:, :, 1:], tracks) for tracks in states)
        if how.maps:
            extend = jax.vmap(jax.vmap(functools.partial(extended, how.memory)))
            transition = jax.tree.map(lambda x: x[:, :, 0], transition)
            transition = jax.tree.map(lambda x: x[:, :, None], extend(transition, chunk))
        elif jax.tree.leaves(later)[0].shape[2]:
            tracks = jax.vmap(functools.partial(write, how.with_no_reads()), in_axes=(0, 0, None))
            later, _ = jax.vmap(jax.vmap(tracks))(later, anchors, chunk)
        ends = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=2), ends, later)
        if self.counts is not None:
            ends = _without_padding(how.memory, ends, chunk, self.counts)
        kept = jax.tree.map(lambda x: x[:, :, None, None], kept)
        ends, kept = spoil(how.memory, rows, np.array([True]), ends, kept)
        return Run(ends, transition), kept

    def cached(self, how: Writing, ends: Run, blocks: Blocks) -> tuple[Bank, Candidates]:
        """The states in the slots of each row."""
        cache, key = self.cache, blocks.tokens.key
        config, slots = cache.config, cache.config.slots

        def keys(pooling: str) -> Keys:
            check_pooling(config, pooling)
            live = cache.key_sum[:, :, :1, None] + jnp.cumsum(key, axis=3)
            if pooling == "mean":
                before = (
                    cache.position
                    - slots.first(cache.record, self.block) * config.segmentation.size
                )
                tokens = before[:, None] + jnp.arange(1, key.shape[3] + 1)[None]
                live /= tokens.astype(live.dtype)[:, None, None, :, None]
            return Keys(live, cache.storages[1].all(cache.pooled)[:, :, : slots.num_slots])

        candidates = slots.candidates(cache.record, self.block, keys)
        ended = None
        if config.borrows and slots.num_slots:
            # The other layer may have taken later tokens; slot i has the state of segment i.
            assert candidates.counts is not None
            assert candidates.held is not None
            ended = jnp.arange(slots.num_slots)[None] < self.block[:, None]
            counts = jnp.where(ended[:, None], candidates.counts, 0)
            candidates = candidates._replace(counts=counts, held=candidates.held & ended)
        spans = functools.partial(span_keys, cache, key)
        candidates = candidates._replace(exact=exact_of(cache, key.dtype), spans=spans)
        if config.tree is not None:
            nodes = functools.partial(cache.storages[1].take, cache.pooled)
            candidates = candidates._replace(nodes=nodes)
        return SlotBank(how.memory, cache, key.dtype, ended), candidates


def _without_padding(memory: Memory, states: State, chunk: Rows, counts: Int[Array, "b"]) -> State:
    """States (b, h, tracks, ...) after the first tokens of (b, h, m, ...), so many of each row."""
    of_tracks = jax.vmap(memory.without_padding, (0, None, None, None))
    of_rows = jax.vmap(jax.vmap(of_tracks, (0, 0, 0, None)))
    return of_rows(states, chunk.key, chunk.value, counts)


def _where(rows: Bool[Array, "b ..."], new: Array, old: Array) -> Array:
    """``new`` in the marked rows and tracks, of arrays (b, h, tracks, ...)."""
    mask = rows.reshape(rows.shape[0], 1, rows.shape[1], *[1] * (new.ndim - 3))
    return jnp.where(mask, new, old)
