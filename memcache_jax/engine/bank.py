"""The memory's states at the ends of a plan's buckets: taken, composed, or written again."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Int, State
from memcache_jax.engine.documents import buckets_of_documents, runs_of_documents
from memcache_jax.engine.finite import composed
from memcache_jax.engine.types import Rows, Writing
from memcache_jax.engine.write import write_runs
from memcache_jax.memories import Memory
from memcache_jax.memories.base import Run
from memcache_jax.segmentation import ReadPlan


def compose_plan(memory: Memory, plan: ReadPlan) -> bool:
    """Whether the states of a plan's buckets that begin anew compose from those of its blocks."""
    return memory.merges and plan.dyadic and bool(plan.begins.all())


def bucket_states(how: Writing, ends: Run, rows: Rows, plan: ReadPlan) -> State:
    """The states at the ends of buckets that all begin anew, (b, h, buckets, ...).

    The state of a bucket of several segments is that of one run over them from the initial state.
    Memories whose runs compose build it from shorter runs; others write the bucket again.

    Args:
      how: as for ``write_blocks``.
      ends: the runs of each block, as from ``write_blocks``; with transitions if they compose.
      rows: as for ``write_blocks``; unused where runs compose.
      plan: the buckets.
    """
    memory, composes = how.memory, compose_plan(how.memory, plan)
    sizes = plan.buckets[:, 1] - plan.buckets[:, 0]
    parts, places, runs = [], [], ends
    for size in range(1, int(sizes.max()) + 1):
        (chosen,) = np.nonzero(sizes == size)
        if composes and size > 1 and size & (size - 1) == 0:
            runs = _composed(memory, *_neighbours(runs))
        if not len(chosen):
            continue
        begin = plan.buckets[chosen, 0]
        if size == 1 or composes:
            part = _taken(runs.state, begin // size)
        else:
            blocks = (begin[:, None] + np.arange(size)).reshape(-1)
            part = _write_again(how, _taken(rows, blocks), size)
        parts.append(part)
        places.append(chosen)
    order = np.argsort(np.concatenate(places))
    return _taken(_joined(parts), order)


def document_states(
    how: Writing,
    ends: Run,
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
      ends: the runs of each block, as from ``write_blocks``; with transitions if they compose.
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
        return ends.state, after - 1
    sizes = after - first
    reads = jnp.where(sizes == 1, first, -1)
    parts, runs, size = [ends.state], ends, 1
    begin = jnp.broadcast_to(jnp.arange(plan.num_blocks), document.shape[:2])
    while 2 * size <= (plan.buckets[:, 1] - plan.buckets[:, 0]).max(initial=0):
        halves, size = begin, 2 * size
        begin = jax.vmap(lambda row, size=size: runs_of_documents(row, size))(document)
        if ends.transition is not None:
            runs = _composed(
                memory,
                *(
                    _taken_by_row(runs, jax.vmap(jnp.searchsorted)(halves, half))
                    for half in (begin, begin + size // 2)
                ),
            )
            states = runs.state
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


def _neighbours(runs: Run) -> tuple[Run, Run]:
    """Of aligned runs (b, h, runs, ...), the first and the second halves of runs twice as long."""
    pairs = jax.tree.leaves(runs)[0].shape[2] // 2
    first, then = (
        jax.tree.map(lambda x, side=side: x[:, :, side : 2 * pairs : 2], runs) for side in (0, 1)
    )
    return first, then


def _composed(memory: Memory, first: Run, then: Run) -> Run:
    """Composes runs (b, h, runs, ...)."""
    compose: Callable = functools.partial(composed, memory)
    for _ in range(3):
        compose = jax.vmap(compose)
    return compose(first, then)


def _write_again(how: Writing, rows: Rows, size: int) -> State:
    """The states after runs of ``size`` blocks that follow each other in ``rows``."""

    def as_one_block(x: Array) -> Array:
        return x.reshape(*x.shape[:2], x.shape[2] // size, -1, *x.shape[4:])

    return write_runs(how, jax.tree.map(as_one_block, rows))
