"""One part of a sequence on a mesh: it writes its own segments and reads those of all parts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Float, Matrices, State
from memcache_jax.engine.bank import bucket_states
from memcache_jax.engine.documents import running_document_keys
from memcache_jax.engine.read import ArrayBank, Bank, blind_where_gates_are_zero
from memcache_jax.engine.run import Layout
from memcache_jax.engine.types import (
    Blocks,
    Candidates,
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
from memcache_jax.memories import Memory
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

    def write(self, how: Writing, rows: Rows) -> tuple[State, Views]:
        """Writes this part's segments, and a second time if they continue the part before."""
        restarts = self.own.begins & (not self.carries)
        if self.carries:
            first = how.initial(rows.key.shape[:2])
            ends, _ = write_blocks(how.with_no_reads(), rows, restarts)
            end = jax.tree.map(lambda x: x[:, :, -1], ends)
            controls = jax.tree.map(
                lambda x: x.reshape(*x.shape[:2], -1, *x.shape[5:]), rows.controls
            )
            before = _state_before(how.memory, first, end, controls, self.axis)
            how = how._replace(initial=lambda shape: before)
        return write_blocks(how, rows, restarts)

    def cached(self, how: Writing, ends: State, blocks: Blocks) -> tuple[Bank, Candidates]:
        """The states of all parts: gathered and merged into buckets, or on a ring."""
        candidates = self._candidates(blocks)
        if self.ring:
            matrices = how.memory.matrices(ends)
            bank = RingBank(how.memory, matrices, how.implementation, candidates.states, self.axis)
            return bank, candidates
        plan = self.plan
        if plan.spans_segments.any() and not self.carries:
            # Merging needs whole states, but of the tokens only their controls.
            ends, controls = _gathered((ends, blocks.rows.controls), self.axis)
            rows = blocks.rows._replace(controls=controls)
            matrices = how.memory.matrices(bucket_states(how, ends, rows, plan))
        else:
            matrices = _gathered(how.memory.matrices(ends), self.axis)
            matrices = jax.tree.map(lambda x: x[:, :, plan.buckets[:, 1] - 1], matrices)
        return ArrayBank(how.memory, matrices, how.implementation), candidates

    def _candidates(self, blocks: Blocks) -> Candidates:
        own, plan = self.own, self.plan
        count = own.num_blocks
        begin = lax.axis_index(self.axis) * count

        def mine(table: np.ndarray) -> Array:
            return lax.dynamic_slice_in_dim(jnp.asarray(table), begin, count)[None]

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

        states, same = mine(plan.reads), None
        if self.document is not None:
            of_state = lax.all_gather(self.document[:, :, -1], self.axis, axis=1, tiled=True)
            after = jnp.asarray(plan.buckets[:, 1])[jnp.maximum(states[0], 0)]
            same = self.document[..., None] == of_state[:, after - 1][:, :, None]
        return Candidates(states, mine(plan.distances), keys, same_document=same)


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
            gates, every = gates_by_state(selection, slots), jnp.arange(slots)
            states = jnp.broadcast_to(every, (*self.table.shape[:2], slots))
            selection = OfBlocks(states, gates, selection.live, unread=True)
        read = blind_where_gates_are_zero(read) if selection.unread else read
        return read_blocks(read, matrices, x, selection, self.implementation, self.axis)


def _gathered(tree: Any, axis: Any) -> Any:
    """The blocks (b, h, n, ...) of all parts, in order."""
    return jax.tree.map(lambda x: lax.all_gather(x, axis, axis=2, tiled=True), tree)


def _state_before(memory: Memory, first: State, end: State, controls: Any, axis: Any) -> State:
    """The state before each part, from the states that each part ends with when written alone."""
    merge = jax.vmap(jax.vmap(memory.merge))
    index, parts = lax.axis_index(axis), lax.axis_size(axis)
    hops = [(part, part + 1) for part in range(parts - 1)]

    def hop(before: State, _: None) -> tuple[State, None]:
        passed = lax.ppermute(merge(before, end, controls), axis, hops)
        # Nothing comes before the first part.
        return jax.tree.map(lambda new, old: jnp.where(index > 0, new, old), passed, first), None

    return lax.scan(hop, first, None, length=parts - 1)[0]
