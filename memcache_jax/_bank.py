"""The bank of cached states: those that the memory has at the ends of a plan's buckets."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._documents import buckets_of_documents, runs_of_documents
from memcache_jax._typing import Array, Int, State
from memcache_jax._writing import write_runs
from memcache_jax.memories import Memory
from memcache_jax.segmentation import ReadPlan


def bucket_states(
    memory: Memory,
    ends: State,
    initial: Callable[[tuple[int, ...]], State],
    rows: tuple,
    plan: ReadPlan,
    document: Int[Array, "b n c"] | None,
    *,
    carries: bool,
    implementation: str | None,
) -> tuple[State, np.ndarray | Array]:
    """The cached states, from those at the ends of blocks where they serve.

    A bucket of several segments that begin anew is one run over it from the initial state: merged
    from smaller ones where the memory can, else written once more.

    Args:
      memory: the rule.
      ends: states at the end of each block, as from ``write_blocks``.
      initial: as for ``write_blocks``.
      rows: as for ``write_blocks``.
      plan: the buckets.
      document: the document of each token.
      carries: as for ``write_blocks``.
      implementation: as for ``write_blocks``.

    Returns:
      The states (b, h, states, ...), and which of them each block reads: (n, r), or (b, n, r) where
      buckets follow the documents of a row; -1 for none.
    """
    write = functools.partial(_write_runs, memory, initial, implementation)
    if document is not None and plan.spans_segments.any():
        return _document_states(memory, ends, rows, plan, document, write=write, carries=carries)
    if carries or not plan.spans_segments.any():
        return jax.tree.map(lambda x: x[:, :, plan.buckets[:, 1] - 1], ends), plan.reads
    sizes = plan.buckets[:, 1] - plan.buckets[:, 0]
    parts, places = [], []
    states = ends
    for size in range(1, int(sizes.max()) + 1):
        (chosen,) = np.nonzero(sizes == size)
        merges = memory.mergeable and plan.dyadic
        if merges and size > 1 and size & (size - 1) == 0:
            states = _merge_neighbours(memory, states, rows[3], size)
        if not len(chosen):
            continue
        begin = plan.buckets[chosen, 0]
        if size == 1:
            part = jax.tree.map(lambda x, begin=begin: x[:, :, begin], ends)
        elif merges:
            index = begin // size
            part = jax.tree.map(lambda x, index=index: x[:, :, index], states)
        else:
            blocks = begin[:, None] + np.arange(size)
            runs = jax.tree.map(lambda x, blocks=blocks: x[:, :, blocks.reshape(-1)], rows)
            part = write(runs, size)
        parts.append(part)
        places.append(chosen)
    order = np.argsort(np.concatenate(places))
    return jax.tree.map(lambda x: x[:, :, order], _joined(parts)), plan.reads


def _document_states(
    memory: Memory,
    ends: State,
    rows: tuple,
    plan: ReadPlan,
    document: Int[Array, "b n c"],
    *,
    write: Callable[[tuple, int], State],
    carries: bool,
) -> tuple[State, Int[Array, "b n r"]]:
    """``bucket_states`` where the buckets of each row follow its documents.

    How many runs of a size there are differs between rows, but at most as many as fit in one.
    """
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
        if memory.mergeable:
            left, right = (
                _taken(states, jax.vmap(jnp.searchsorted)(halves, half))
                for half in (begin, begin + size // 2)
            )
            later = _runs(rows[3], begin + size // 2, size // 2)
            states = _merge(memory, left, right, later)
        else:
            states = write(_runs(rows, begin, size), size)
        held = sum(jax.tree.leaves(part)[0].shape[2] for part in parts)
        place = jax.vmap(jnp.searchsorted)(begin, first.reshape(len(first), -1))
        reads = jnp.where(sizes == size, held + place.reshape(first.shape), reads)
        parts.append(states)
    return _joined(parts), reads


def _joined(parts: Sequence[State]) -> State:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=2), *parts)


def _taken(tree: Any, index: Int[Array, "b i"]) -> Any:
    """Of arrays (b, h, n, ...), those of each row by index, (b, h, i, ...)."""
    return jax.tree.map(lambda x: jax.vmap(lambda x, index: x[:, index])(x, index), tree)


def _runs(rows: Any, begin: Int[Array, "b runs"], size: int) -> Any:
    """The blocks of runs of ``size`` blocks, (b, h, runs * size, ...)."""
    return _taken(rows, (begin[..., None] + np.arange(size)[None, None]).reshape(len(begin), -1))


def _merge_neighbours(memory: Memory, states: State, controls: Any, size: int) -> State:
    """States of aligned runs of ``size`` blocks, from those of half the size."""
    pairs = jax.tree.leaves(states)[0].shape[2] // 2
    left, right = (
        jax.tree.map(lambda x, side=side: x[:, :, side : 2 * pairs : 2], states) for side in (0, 1)
    )
    (later,) = np.nonzero(np.arange(pairs * size) % size >= size // 2)
    return _merge(memory, left, right, jax.tree.map(lambda x: x[:, :, later], controls))


def _merge(memory: Memory, left: State, right: State, controls: Any) -> State:
    """Merges runs (b, h, runs, ...), from the later halves' controls by block and chunk."""
    batch = jax.tree.leaves(left)[0].shape[:3]
    merge = memory.merge
    for _ in range(3):
        merge = jax.vmap(merge)
    tokens = jax.tree.map(lambda x: x.reshape(*batch, -1, *x.shape[5:]), controls)
    return merge(left, right, tokens)


def _write_runs(
    memory: Memory,
    initial: Callable[[tuple[int, ...]], State],
    implementation: str | None,
    rows: tuple,
    size: int,
) -> State:
    """The states after runs that begin anew, from the blocks of each one after the other."""
    rows = jax.tree.map(
        lambda x: x.reshape(*x.shape[:2], x.shape[2] // size, -1, *x.shape[4:]), rows
    )
    return write_runs(memory, lambda view, query: (), initial, rows, implementation)[0]
