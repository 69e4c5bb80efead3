"""The memory's states at the ends of a plan's buckets: taken, merged, or written again."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Int, State
from memcache_jax.engine.documents import buckets_of_documents, runs_of_documents
from memcache_jax.engine.types import Rows, Writing
from memcache_jax.engine.write import write_runs
from memcache_jax.memories import Memory
from memcache_jax.segmentation import ReadPlan


def bucket_states(how: Writing, ends: State, rows: Rows, plan: ReadPlan) -> State:
    """The states at the ends of buckets that all begin anew, (b, h, buckets, ...).

    The state of a bucket of several segments is that of one run over them from the initial state.
    Memories that can merge get it from shorter runs; others write the bucket again.

    Args:
      how: as for ``write_blocks``.
      ends: states at the end of each block, as from ``write_blocks``.
      rows: as for ``write_blocks``; merging reads only their controls.
      plan: the buckets.
    """
    memory = how.memory
    sizes = plan.buckets[:, 1] - plan.buckets[:, 0]
    merges = memory.merges and plan.dyadic
    parts, places, runs = [], [], ends
    for size in range(1, int(sizes.max()) + 1):
        (chosen,) = np.nonzero(sizes == size)
        if merges and size > 1 and size & (size - 1) == 0:
            runs = _merge_neighbours(memory, runs, rows.controls, size)
        if not len(chosen):
            continue
        begin = plan.buckets[chosen, 0]
        if size == 1 or merges:
            part = _taken(runs, begin // size)
        else:
            blocks = (begin[:, None] + np.arange(size)).reshape(-1)
            part = _write_again(how, _taken(rows, blocks), size)
        parts.append(part)
        places.append(chosen)
    order = np.argsort(np.concatenate(places))
    return _taken(_joined(parts), order)


def document_states(
    how: Writing,
    ends: State,
    rows: Rows,
    plan: ReadPlan,
    document: Int[Array, "b n c"],
    *,
    carries: bool,
) -> tuple[State, Int[Array, "b n r"]]:
    """The states at the ends of buckets that follow the documents of each row.

    The number of runs of each size varies by row; arrays are padded to the largest possible one.

    Args:
      how: as for ``write_blocks``.
      ends: states at the end of each block, as from ``write_blocks``.
      rows: as for ``write_blocks``.
      plan: the buckets of a document that begins with the first block.
      document: the document of each token.
      carries: whether each segment continues from the one before; then ``ends`` serve as they are.

    Returns:
      The states (b, h, states, ...), and which of them each block reads, -1 for none.
    """
    memory = how.memory
    first, after, _ = jax.vmap(lambda row: buckets_of_documents(plan, row))(document)
    if carries:
        return ends, after - 1
    sizes = after - first
    reads = jnp.where(sizes == 1, first, -1)
    parts, states, size = [ends], ends, 1
    begin = jnp.broadcast_to(jnp.arange(plan.num_blocks), document.shape[:2])
    while 2 * size <= (plan.buckets[:, 1] - plan.buckets[:, 0]).max(initial=0):
        halves, size = begin, 2 * size
        begin = jax.vmap(lambda row, size=size: runs_of_documents(row, size))(document)
        if memory.merges:
            left, right = (
                _taken_by_row(states, jax.vmap(jnp.searchsorted)(halves, half))
                for half in (begin, begin + size // 2)
            )
            later = _runs(rows.controls, begin + size // 2, size // 2)
            states = _merge(memory, left, right, later)
        else:
            states = _write_again(how, _runs(rows, begin, size), size)
        held = sum(jax.tree.leaves(part)[0].shape[2] for part in parts)
        place = jax.vmap(jnp.searchsorted)(begin, first.reshape(len(first), -1))
        reads = jnp.where(sizes == size, held + place.reshape(first.shape), reads)
        parts.append(states)
    return _joined(parts), reads


def _joined(parts: Sequence[State]) -> State:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=2), *parts)


def _taken(tree: Any, index: np.ndarray) -> Any:
    """Of arrays (b, h, n, ...), those by index, (b, h, i, ...)."""
    return jax.tree.map(lambda x: x[:, :, index], tree)


def _taken_by_row(tree: Any, index: Int[Array, "b i"]) -> Any:
    """Of arrays (b, h, n, ...), those of each row by index, (b, h, i, ...)."""
    return jax.tree.map(lambda x: jax.vmap(lambda x, index: x[:, index])(x, index), tree)


def _runs(rows: Any, begin: Int[Array, "b runs"], size: int) -> Any:
    """The blocks of runs of ``size`` blocks, (b, h, runs * size, ...)."""
    blocks = (begin[..., None] + np.arange(size)[None, None]).reshape(len(begin), -1)
    return _taken_by_row(rows, blocks)


def _merge_neighbours(memory: Memory, states: State, controls: Any, size: int) -> State:
    """States of aligned runs of ``size`` blocks, from those of half the size."""
    pairs = jax.tree.leaves(states)[0].shape[2] // 2
    left, right = (
        jax.tree.map(lambda x, side=side: x[:, :, side : 2 * pairs : 2], states) for side in (0, 1)
    )
    (later,) = np.nonzero(np.arange(pairs * size) % size >= size // 2)
    return _merge(memory, left, right, _taken(controls, later))


def _merge(memory: Memory, left: State, right: State, controls: Any) -> State:
    """Merges runs (b, h, runs, ...), from the later halves' controls by block and chunk."""
    batch = jax.tree.leaves(left)[0].shape[:3]
    merge: Callable = memory.merge
    for _ in range(3):
        merge = jax.vmap(merge)
    tokens = jax.tree.map(lambda x: x.reshape(*batch, -1, *x.shape[5:]), controls)
    return merge(left, right, tokens)


def _write_again(how: Writing, rows: Rows, size: int) -> State:
    """The states after runs of ``size`` blocks that follow each other in ``rows``."""

    def as_one_block(x: Array) -> Array:
        return x.reshape(*x.shape[:2], x.shape[2] // size, -1, *x.shape[4:])

    return write_runs(how, jax.tree.map(as_one_block, rows))
