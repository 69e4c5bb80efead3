"""One part of a sequence on a mesh: it writes its own segments and reads those of all parts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int, Matrices, State
from memcache_jax.engine.bank import bucket_states, document_states
from memcache_jax.engine.documents import (
    BlockSums,
    block_sums,
    bucket_candidates,
    buckets_of_documents,
    running_document_keys,
)
from memcache_jax.engine.exact import exact_of_blocks
from memcache_jax.engine.read import ArrayBank, Bank, blind_where_gates_are_zero
from memcache_jax.engine.run import Layout
from memcache_jax.engine.spans import span_keys
from memcache_jax.engine.types import (
    Blocks,
    Candidates,
    Exact,
    Keys,
    OfBlocks,
    OfTokens,
    Rows,
    Selection,
    Views,
    Writing,
)
from memcache_jax.engine.write import write_blocks
from memcache_jax.gating import gates_by_state, pooled_keys, running_keys
from memcache_jax.memories.base import Run
from memcache_jax.segmentation import ReadPlan
from memcache_jax.sharding.ring import read_blocks, read_tokens


@dataclasses.dataclass(frozen=True)
class Part(Layout):
    """This device's part of a sequence, within a ``shard_map``.

    Attributes:
      axis: the axis of the mesh that divides time, or several.
      own: the plan of this part alone.
      plan: the plan of the whole sequence.
      carries: whether each segment continues from the one before.
      ring: whether states pass from part to part, rather than being gathered.
      document: (b, n, c) the document of each token, counted over the whole sequence; None where
        no documents are packed.
    """

    axis: Any
    own: ReadPlan
    plan: ReadPlan
    carries: bool
    ring: bool
    document: Any

    def write(self, how: Writing, rows: Rows) -> tuple[Run, Views]:
        """Writes this part's segments, and a second time if they continue the part before."""
        restarts = self.own.begins & (not self.carries)
        spans = bool(self.plan.spans_segments.any())
        if not self.carries:
            return write_blocks(how.with_maps(spans), rows, restarts)
        runs, _ = write_blocks(how.with_no_reads().with_maps(), rows, restarts)
        before, lost = self._before(how, jax.tree.map(lambda x: x[:, :, -1], runs), rows)
        # A state that depends on a number that was not finite spoils what goes on from it.
        assert rows.bad is not None
        bad = rows.bad.at[:, :, 0, 0, 0].set(rows.bad[:, :, 0, 0, 0] | lost)
        if rows.begun is not None:
            bad = jnp.where(rows.begun[:, :, :1, :1, :1] > 0, rows.bad, bad)
        how = how._replace(initial=lambda shape: before)
        return write_blocks(how, rows._replace(bad=bad), restarts)

    def _before(self, how: Writing, whole: Run, rows: Rows) -> tuple[State, Bool[Array, "b h"]]:
        """The state before each part, from the run that each part is when written alone.

        Each hop doubles the number of parts that a run covers, so that log2 of the parts are
        enough; what crosses the mesh in a hop is one run. Also returns whether the state depends on
        a number that was not finite; there it is some other one.
        """
        compose = jax.vmap(jax.vmap(how.memory.compose))
        goes_on = jnp.ones(rows.key.shape[:2], bool)
        if rows.begun is not None:
            goes_on = (rows.begun == 0).all(axis=(2, 3, 4))
        lost = jnp.isnan(jax.tree.leaves(whole.state)[0]).reshape(*goes_on.shape, -1).any(axis=-1)
        finite = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), 0, x), whole.state)
        run, distance = whole._replace(state=finite), 1
        index = lax.axis_index(self.axis)
        while distance < lax.axis_size(self.axis):  # the run of the last parts up to this one
            earlier, spoilt, before = _from_before((run, lost, goes_on), distance, self.axis)
            longer = compose(earlier, run), lost | (goes_on & spoilt), goes_on & before
            run, lost, goes_on = _where(index >= distance, longer, (run, lost, goes_on))
            distance *= 2
        first = how.initial(rows.key.shape[:2]), jnp.zeros_like(lost)
        return last_before((run.state, lost), first, self.axis)

    def cached(self, how: Writing, ends: Run, blocks: Blocks) -> tuple[Bank, Candidates]:
        """The states of all parts: gathered and composed into buckets, or on a ring."""
        if self.document is not None and self.plan.spans_segments.any():
            return self._cached_of_documents(how, ends, blocks)
        candidates = self._candidates(blocks)
        matrices = how.memory.matrices(ends.state)
        if how.exact and len(self.plan.buckets):
            candidates = candidates._replace(exact=self._exact(how, matrices, blocks, candidates))
        if self.ring:
            bank = RingBank(how.memory, matrices, how.implementation, candidates.states, self.axis)
            return bank, candidates
        plan = self.plan
        if plan.spans_segments.any() and not self.carries:
            ends = _gathered(ends, self.axis)
            matrices = how.memory.matrices(bucket_states(how, ends, blocks.rows, plan))
        else:
            if len(plan.buckets):  # else nothing is read of them
                matrices = _gathered(matrices, self.axis)
            matrices = jax.tree.map(lambda x: x[:, :, plan.buckets[:, 1] - 1], matrices)
        return ArrayBank(how.memory, matrices, how.implementation), candidates

    def _cached_of_documents(
        self, how: Writing, ends: Run, blocks: Blocks
    ) -> tuple[Bank, Candidates]:
        """``cached`` where buckets of several segments follow each row's documents.

        What crosses the mesh beside the runs is the last document and the sum of keys of each
        block. Every part composes all buckets.
        """
        plan, sums = self.plan, block_sums(blocks.pooled, self.document)
        ends, keys = _gathered((ends, sums.keys), self.axis)
        rows = sums.counts, self.document[:, :, -1:]
        counts, last = _gathered(rows, self.axis, dim=1)
        sums = BlockSums(keys, counts)
        states, reads = document_states(how, ends, blocks.rows, plan, last, carries=self.carries)
        slots = jax.vmap(lambda row: buckets_of_documents(plan, row))(last)
        slots, reads = jax.tree.map(self._mine, (slots, reads))
        candidates = bucket_candidates(
            self.own, blocks.tokens.key, sums, slots, self.document, last[:, :, 0]
        )
        matrices = how.memory.matrices(states)
        bank = ArrayBank(how.memory, matrices, how.implementation)
        return bank, candidates._replace(states=reads)

    def _exact(
        self, how: Writing, matrices: Matrices, blocks: Blocks, candidates: Candidates
    ) -> Exact:
        """The tokens kept of all parts' segments, which are blocks; each part chooses its own."""
        each = np.arange(self.own.num_blocks)[None]
        sizes = 1, how.exact, self.own.block_size
        own = exact_of_blocks(how.memory, matrices, blocks, each, blocks.document, *sizes)
        count = len(self.plan.buckets)
        key, value = (x[:, :, :count] for x in _gathered((own.key, own.value), self.axis))
        counts = own.counts
        if counts is not None:
            counts = _gathered(counts, self.axis, dim=1)[:, :count]
        return Exact(key, value, own.longest, counts, table=candidates.states)

    def _mine(self, table: Int[Array, "_ blocks r"]) -> Int[Array, "_ n r"]:
        """This part's rows of a table of all blocks."""
        count = self.own.num_blocks
        begin = lax.axis_index(self.axis) * count
        return lax.dynamic_slice_in_dim(table, begin, count, axis=1)

    def _candidates(self, blocks: Blocks) -> Candidates:
        own, plan = self.own, self.plan
        count = own.num_blocks

        def keys(pooling: str) -> Keys:
            block = np.arange(count)
            buckets, none = np.stack([block, block + 1], axis=1), np.full((count, 1), -1)
            each = ReadPlan(own.block_size, buckets, none, block)

            def of_head(key: Float[Array, "n c k"], pooled: Array, document: Any) -> Keys:
                pooled = pooled_keys(pooled, each, pooling, document)
                pooled = lax.all_gather(pooled, self.axis, axis=0, tiled=True)
                pooled = pooled_keys(pooled[:, None], plan, pooling)
                if document is None:
                    return Keys(running_keys(key, own, pooling), pooled)
                return Keys(running_document_keys(key, own, pooling, document), pooled)

            of_row = jax.vmap(of_head, in_axes=(0, 0, None))
            return jax.vmap(of_row)(blocks.tokens.key, blocks.pooled, blocks.document)

        states, distances = (
            self._mine(jnp.asarray(table)[None]) for table in (plan.reads, plan.distances)
        )
        same = None
        if self.document is not None and plan.reads.size:
            of_state = lax.all_gather(self.document[:, :, -1], self.axis, axis=1, tiled=True)
            after = jnp.asarray(plan.buckets[:, 1])[jnp.maximum(states[0], 0)]
            same = self.document[..., None] == of_state[:, after - 1][:, :, None]
        spans = functools.partial(
            *(span_keys, own, plan, blocks.tokens.key, blocks.pooled),
            document=blocks.document,
            gather=lambda x, dim: lax.all_gather(x, self.axis, axis=dim, tiled=True),
        )
        return Candidates(states, distances, keys, same_document=same, spans=spans)


@dataclasses.dataclass(frozen=True)
class RingBank(ArrayBank):
    """The states of this part, which pass from part to part to be read.

    In ``table``, the candidates' states, slot i holds state i or none.
    """

    table: Any
    axis: Any

    def gather(
        self,
        read: Callable[..., Array],
        matrices: Matrices,
        x: Float[Array, "b h n c in"],
        selection: Selection,
    ) -> Float[Array, "b h n c out"]:
        """As ``ArrayBank.gather``, over all parts, with states numbered along the sequence."""
        if isinstance(selection, OfTokens):
            return read_tokens(read, matrices, x, selection, self.implementation, self.axis)
        if selection.states is not self.table:  # a table of the aggregation's own
            slots = lax.axis_size(self.axis) * matrices[0].shape[2]
            own = selection._replace(beside=None)
            gates, every = gates_by_state(own, slots), jnp.arange(slots)
            states = jnp.broadcast_to(every, (*self.table.shape[:2], slots))
            selection = OfBlocks(states, gates, selection.live, unread=True)
        read = blind_where_gates_are_zero(read) if selection.unread else read
        return read_blocks(read, matrices, x, selection, self.implementation, self.axis)


def _gathered(tree: Any, axis: Any, dim: int = 2) -> Any:
    """The blocks of all parts in order, by default of arrays (b, h, n, ...)."""
    return jax.tree.map(lambda x: lax.all_gather(x, axis, axis=dim, tiled=True), tree)


def last_before(last: Any, first: Any, axis: Any) -> Any:
    """What the part before ends with, from what each part does; ``first`` for the first part."""
    return _where(lax.axis_index(axis) > 0, _from_before(last, 1, axis), first)


def _from_before(tree: Any, distance: int, axis: Any) -> Any:
    """The arrays of the part so many before; zeros where there is none."""
    hops = [(part, part + distance) for part in range(lax.axis_size(axis) - distance)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, hops), tree)


def _where(condition: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)
