"""TPU kernels that keep states in VMEM from chunk to chunk.

The grid runs over memories and, in order, over their chunks. The forward pass writes the state
before each group of chunks to HBM. The backward pass walks the groups from last to first and visits
each one twice: once forward, to recompute in VMEM the states that its chunks start from, and once
in reverse.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memcache_jax.kernels._sweep_blocks import (
    fill,
    for_each_part,
    load,
    mapped,
    reshaped,
    scratch,
    shaped,
    specs,
    state_shapes,
    turn,
    turn_back,
    turned_scratch,
    units_first,
    wide,
    with_turned,
)
from memcache_jax.kernels._sweep_plan import Sweep
from memcache_jax.kernels._tpu import tpu_call

Step = Callable[[Any, Any], tuple[Any, Any]]
"""Some memories through one chunk, side by side: (states, rows) -> (next states, outputs)."""

Pull = Callable[[Any, Any, Any, Any], tuple[Any, Any]]
"""(states, rows, d_next, d_outputs) -> (d_states, d_rows)."""


def forward(
    sweep: Sweep, step: Step, state: Any, rows: Any, y: Any, *, starts: bool = True
) -> tuple[Any, Any, Any]:
    """Returns the states at the ends of runs, the outputs, and the states that groups start from.

    Args:
      sweep: how the work is divided.
      step: runs one chunk of some memories.
      state: the first states, (units, ...).
      rows: (units, chunks, ...), or ``Inside``.
      y: shapes of the outputs, (units, chunks, ...), or ``Inside``.
      starts: whether to write the states that groups start from; if not, None takes their place.
    """
    apart = units_first(rows)
    units, chunks = jax.tree.leaves(apart)[0].shape[:2]
    lengths = sweep.group * sweep.every, sweep.group
    of_runs, of_groups = (
        jax.tree.map(lambda x, n=n: shaped(x, (units, chunks // n, *x.shape[1:])), state)
        for n in lengths
    )
    of_groups = of_groups if starts else None
    run, group = map(np.int32, lengths)
    blocks = functools.partial(specs, sweep.together)
    of_chunk = functools.partial(blocks, 2, lambda i, c: (i, c))
    of_run = functools.partial(blocks, 2, lambda i, c: (i, lax.div(c, run)))
    of_group = functools.partial(blocks, 2, lambda i, c: (i, lax.div(c, group)))

    def kernel(
        state_refs, rows_refs, y_refs, end_refs, start_refs, carried_refs, turned, y_turned
    ):  # fmt: skip
        chunk = pl.program_id(1)
        turn(rows_refs, turned, jax.tree.map(lambda x: True, apart))
        of_rows, of_y = with_turned(rows_refs, turned), with_turned(y_refs, y_turned)

        def part(at):
            @pl.when(chunk == 0)
            def _():
                fill(carried_refs, load(state_refs, state, 1, at), at)

            before = load(carried_refs, state, 1, at)
            if starts:

                @pl.when(lax.rem(chunk, group) == 0)
                def _():
                    fill(start_refs, before, at)

            after, outputs = step(before, load(of_rows, apart, 2, at))
            fill(of_y, outputs, at)
            fill(carried_refs, after, at)

            @pl.when(lax.rem(chunk, run) == run - 1)
            def _():
                fill(end_refs, after, at)

        for_each_part(sweep.together, sweep.side, part)
        turn_back(y_refs, y_turned)

    out, ends, first = tpu_call(
        kernel,
        grid=(units // sweep.together, chunks),
        in_specs=[blocks(1, lambda i, c: (i,), state), of_chunk(rows)],
        out_specs=[of_chunk(y), of_run(of_runs), of_group(of_groups)],
        out_shape=[wide(y, 2), wide(of_runs, 2), wide(of_groups, 2)],
        scratch_shapes=[
            scratch(state_shapes(sweep.together, state)),
            turned_scratch(sweep.together, rows),
            turned_scratch(sweep.together, y),
        ],
        name=f"{sweep.name}_forward",
        dimension_semantics=("parallel", "arbitrary"),
        vmem_bytes=sweep.forward_bytes,
    )(wide(state, 1), wide(rows, 2))
    return reshaped(ends, of_runs), reshaped(out, y), reshaped(first, of_groups)


def backward(
    sweep: Sweep, step: Step, pull: Pull, starts: Any, rows: Any, d_ends: Any, d_y: Any, late: Any
) -> tuple[Any, Any]:
    """Returns the cotangents of the first states and of the rows.

    Args:
      sweep: as for ``forward``.
      step: as for ``forward``.
      pull: its pullback.
      starts: the states that groups start from.
      rows: as for ``forward``.
      d_ends: cotangents of the states at the ends of runs.
      d_y: cotangents of the outputs.
      late: a tree of booleans, true for rows that the next state does not depend on: these are
        loaded in reverse only.
    """
    apart, apart_y = units_first(rows), units_first(d_y)
    units, chunks = jax.tree.leaves(apart)[0].shape[:2]
    groups, length = chunks // sweep.group, sweep.group
    state = jax.tree.map(lambda x: shaped(x, (units, *x.shape[2:])), starts)

    def both_ways(i: Any, j: Any, s: Any) -> tuple:
        return i, (groups - 1 - j) * length + jnp.minimum(s, 2 * length - 1 - s)

    def in_reverse(i: Any, j: Any, s: Any) -> tuple:
        return i, (groups - 1 - j) * length + jnp.minimum(length - 1, 2 * length - 1 - s)

    blocks = functools.partial(specs, sweep.together)
    of_chunk = functools.partial(blocks, 2, in_reverse)
    of_start = functools.partial(blocks, 2, lambda i, j, s: (i, groups - 1 - j))
    of_end = functools.partial(
        blocks, 2, lambda i, j, s: (i, lax.div(groups - 1 - j, np.int32(sweep.every)))
    )

    def of_rows(late: bool, x: Any) -> Any:
        return blocks(2, in_reverse if late else both_ways, x)

    def kernel(
        start_refs, rows_refs, d_end_refs, d_y_refs, d_rows_refs, d_state_refs,
        carried_refs, d_carried_refs, starts_refs, turned, d_y_turned, d_rows_turned,
    ):  # fmt: skip
        j, s = pl.program_id(1), pl.program_id(2)
        # The last chunk of a group comes twice in a row.
        turn(rows_refs, turned, jax.tree.map(lambda x: s >= length if x else s != length, late))
        turn(d_y_refs, d_y_turned, jax.tree.map(lambda x: s >= length, apart_y))
        rows_, d_y_ = with_turned(rows_refs, turned), with_turned(d_y_refs, d_y_turned)
        d_rows_ = with_turned(d_rows_refs, d_rows_turned)

        def part(at):
            @pl.when(s == 0)
            def _():
                fill(carried_refs, load(start_refs, starts, 2, at), at)

            @pl.when((s == 0) & (j == 0))
            def _():
                zeros = jax.tree.map(jnp.zeros_like, load(d_carried_refs, state, 1, at))
                fill(d_carried_refs, zeros, at)

            @pl.when((s == 0) & (lax.rem(j, np.int32(sweep.every)) == 0))
            def _():
                d_carried = load(d_carried_refs, state, 1, at)
                d_end = load(d_end_refs, d_ends, 2, at)
                fill(d_carried_refs, jax.tree.map(jnp.add, d_carried, d_end), at)

            @pl.when(s < length)
            def _():
                fill(_of_chunk(starts_refs, s), load(carried_refs, state, 1, at), at)

            @pl.when(s < length - 1)
            def _():
                carried = load(carried_refs, state, 1, at)
                fill(carried_refs, step(carried, load(rows_, apart, 2, at))[0], at)

            @pl.when(s >= length)
            def _():
                d_carried, d_rows = pull(
                    load(_of_chunk(starts_refs, 2 * length - 1 - s), state, 1, at),
                    load(rows_, apart, 2, at),
                    load(d_carried_refs, state, 1, at),
                    load(d_y_, apart_y, 2, at),
                )
                fill(d_carried_refs, d_carried, at)
                fill(d_rows_, d_rows, at)
                fill(d_state_refs, d_carried, at)

        for_each_part(sweep.together, sweep.side, part)

        @pl.when(s >= length)
        def _():
            turn_back(d_rows_refs, d_rows_turned)

    shapes = state_shapes(sweep.together, state)
    many = jax.tree.map(lambda x: pltpu.VMEM((length, *x.shape), x.dtype), shapes)
    turned = functools.partial(turned_scratch, sweep.together)
    d_rows, d_state = tpu_call(
        kernel,
        grid=(units // sweep.together, groups, 2 * length),
        in_specs=[
            of_start(starts),
            mapped(of_rows, late, rows),
            of_end(d_ends),
            of_chunk(d_y),
        ],
        out_specs=[of_chunk(rows), blocks(1, lambda i, j, s: (i,), state)],
        out_shape=[wide(rows, 2), wide(state, 1)],
        scratch_shapes=[
            *(scratch(shapes), scratch(shapes), many),
            *(turned(rows), turned(d_y), turned(rows)),
        ],
        name=f"{sweep.name}_backward",
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_bytes=sweep.backward_bytes,
    )(wide(starts, 2), wide(rows, 2), wide(d_ends, 2), wide(d_y, 2))
    return reshaped(d_state, state), reshaped(d_rows, rows)


def _of_chunk(refs: Any, place: Any) -> Any:
    """The states in vector memory that one chunk of a group starts from."""
    return jax.tree.map(lambda ref: ref.at[place], refs)
