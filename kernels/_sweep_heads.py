"""TPU kernels that keep large states in VMEM and read tokens in the model's layout.

As ``_sweep``, for states of which few fit into VMEM. A block of tokens has all heads of a chunk.
A program transposes the tokens of a group of chunks into VMEM, carries one head after another
through the group, and then transposes the results back. So tokens are not transposed in HBM, and a
program holds a single state for each head, the carried one. Rows are (units, chunks, ...), or
``Inside`` for tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memcache_jax.kernels._sweep import Pull, Step
from memcache_jax.kernels._sweep_blocks import (
    fill,
    is_inside,
    load,
    reshaped,
    scratch,
    shaped,
    specs,
    state_shapes,
    units_first,
    wide,
)
from memcache_jax.kernels._sweep_plan import Sweep
from memcache_jax.kernels._sweep_visits import Visits, fill_at, rows_at, turn, turn_back
from memcache_jax.kernels._tpu import tpu_call
from memcache_jax.kernels.chunk_update.edges import Edges

_ALL, _ONE = slice(None), 1


def forward(
    sweep: Sweep, step: Step, edges: Edges, given: Any, rows: Any, y: Any, *, starts: bool = True
) -> tuple[Any, Any, Any]:
    """Returns what is left of the last states, the outputs, and the states that groups start from.

    Args:
      sweep: how the work is divided.
      step: runs one chunk of some memories.
      edges: how states begin and end.
      given: what memories begin with, (units, ...) or of fewer units, see ``Visits``.
      rows: as for ``_sweep.forward``.
      y: as for ``_sweep.forward``.
      starts: whether to write the states that groups start from; if not, None takes their place.
    """
    apart, visits = units_first(rows), Visits.of(sweep, given, rows, 1)
    state = _per_unit(edges.begin, given, visits.units)
    ends = _per_unit(edges.finish, state, visits.units)
    of_groups = jax.tree.map(lambda x: shaped(x, (len(x), visits.groups, *x.shape[1:])), state)
    of_groups = of_groups if starts else None

    def in_order(j: Any, c: Any) -> Any:
        return j * visits.length + c

    def of_rows(turns: Callable, tree: Any) -> Any:
        return visits.of_rows(turns, in_order, tree, in_order)

    def kernel(given_refs, rows_refs, y_refs, end_refs, start_refs, carried, turned, y_turned):
        j, s = pl.program_id(2), pl.program_id(3)

        def visit(head: Any, c: Any) -> None:
            at = pl.ds(head, 1)

            @pl.when((c == 0) & (j == 0))
            def _():
                fill(carried, edges.begin(load(given_refs, given, 1, visits.at(head))), at)

            before = load(carried, state, 1, at)
            if starts:

                @pl.when(c == 0)
                def _():
                    fill(start_refs, before, _ALL)

            after, outputs = step(before, rows_at(rows_refs, apart, turned, c, head))
            fill_at(y_turned, jax.tree.leaves(outputs), c, head)
            fill(carried, after, at)

            @pl.when((c == visits.length - 1) & (j == visits.groups - 1))
            def _():
                fill(end_refs, edges.finish(after), _ALL)

        visits.when(
            s,
            functools.partial(turn, rows_refs, turned),
            visit,
            functools.partial(turn_back, y_refs, y_turned),
        )

    out, last, first = tpu_call(
        kernel,
        grid=visits.grid,
        in_specs=[visits.of_given(visits.in_first, given), of_rows(visits.loads, rows)],
        out_specs=[
            of_rows(visits.stores, y),
            specs(_ONE, 1, visits.in_last, ends),
            specs(_ONE, 2, lambda p, n, j, s: (visits.unit(p, n, s), j), of_groups),
        ],
        out_shape=[wide(y, 2), wide(ends, 1), wide(of_groups, 2)],
        scratch_shapes=[
            scratch(state_shapes(visits.heads, state)),
            *(visits.turned(rows), visits.turned(y)),
        ],
        name=f"{sweep.name}_forward",
        dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        vmem_bytes=sweep.forward_bytes,
    )(wide(given, 1), wide(rows, 2))
    return reshaped(last, ends), reshaped(out, y), reshaped(first, of_groups)


def backward(
    sweep: Sweep,
    step: Step,
    pull: Pull,
    edges: Edges,
    given: Any,
    starts: Any,
    rows: Any,
    d_ends: Any,
    d_y: Any,
) -> tuple[Any, Any]:
    """Returns the cotangents of ``given`` and of the rows.

    Each head is carried through a group and then back through it.

    Args:
      sweep: as for ``forward``.
      step: as for ``forward``.
      pull: its pullback.
      edges: as for ``forward``.
      given: as for ``forward``.
      starts: the states that groups start from; None for a single group.
      rows: as for ``forward``.
      d_ends: cotangents of what is left of the last states.
      d_y: cotangents of the outputs.
    """
    apart, visits = units_first(rows), Visits.of(sweep, given, rows, 2)
    length, last = visits.length, visits.groups - 1
    state = _per_unit(edges.begin, given, visits.units)

    def in_order(j: Any, c: Any) -> Any:
        return (last - j) * length + c

    def both_ways(j: Any, v: Any) -> Any:
        return in_order(j, jnp.minimum(v, 2 * length - 1 - v))

    def in_reverse(j: Any, v: Any) -> Any:
        return in_order(j, jnp.minimum(length - 1, 2 * length - 1 - v))

    def kernel(
        start_refs, rows_refs, d_end_refs, d_y_refs, d_rows_refs, d_given_refs,
        carried, d_carried, many, turned, d_y_turned,
    ):  # fmt: skip
        n, j, s = (pl.program_id(axis) for axis in (1, 2, 3))

        def load_chunk(c: Any) -> None:
            turn(rows_refs, turned, c)
            turn(d_y_refs, d_y_turned, c)

        def visit(head: Any, v: Any) -> None:
            at, c = pl.ds(head, 1), jnp.minimum(v, 2 * length - 1 - v)

            @pl.when(v == 0)
            def _():
                if starts is None:
                    first = edges.begin(load(start_refs, given, 1, visits.at(head)))
                else:
                    first = load(start_refs, starts, 2, _ALL)
                fill(carried, first, _ALL)

            @pl.when((v == 0) & (j == 0))
            def _():
                d_end = load(d_end_refs, d_ends, 1, _ALL)
                fill(d_carried, edges.pull_finish(_of_one(state), d_end), at)

            @pl.when(v < length)
            def _():
                before = load(carried, state, 1, _ALL)
                fill(jax.tree.map(lambda ref: ref.at[c], many), before, _ALL)

            @pl.when(v < length - 1)
            def _():
                before = load(carried, state, 1, _ALL)
                fill(carried, step(before, rows_at(rows_refs, apart, turned, c, head))[0], _ALL)

            @pl.when(v >= length)
            def _():
                d_before, d_rows = pull(
                    load(jax.tree.map(lambda ref: ref.at[c], many), state, 1, _ALL),
                    rows_at(rows_refs, apart, turned, c, head),
                    load(d_carried, state, 1, at),
                    rows_at(d_y_refs, units_first(d_y), d_y_turned, c, head),
                )
                fill(d_carried, d_before, at)
                refs = jax.tree.leaves(d_rows_refs, is_leaf=is_inside)
                pairs = list(zip(refs, jax.tree.leaves(d_rows), strict=True))
                # The tokens of this chunk are not read again: their cotangents take their place.
                fill_at(turned, [d for ref, d in pairs if is_inside(ref)], c, head)
                plain = [(ref, d) for ref, d in pairs if not is_inside(ref)]
                fill([ref for ref, _ in plain], [d for _, d in plain], _ALL)

            @pl.when((v == 2 * length - 1) & (j == last))
            def _():
                d_first = edges.pull_begin(_of_one(given), load(d_carried, state, 1, at))

                def add(ref: Any, d: Any) -> None:
                    place = (visits.at(head), ...)
                    block = d.reshape(1, *ref.shape[1:])
                    ref[place] = (
                        block if visits.runs == 1 else jnp.where(n == 0, block, ref[place] + block)
                    )

                jax.tree.map(add, d_given_refs, d_first)

        visits.when(s, load_chunk, visit, functools.partial(turn_back, d_rows_refs, turned))

    def at_start(p: Any, n: Any, j: Any, s: Any) -> tuple:
        return visits.unit(p, n, s), last - j

    def of_rows(chunk: Callable, turns: Callable, tree: Any) -> Any:
        return visits.of_rows(turns, chunk, tree, in_order)

    of_start = specs(_ONE, 2, at_start, starts)
    if starts is None:
        of_start = visits.of_given(lambda *place: at_start(*place)[:1], given)
    one = state_shapes(_ONE, state)
    many = jax.tree.map(lambda x: pltpu.VMEM((length, *x.shape), x.dtype), one)
    d_rows, d_given = tpu_call(
        kernel,
        grid=visits.grid,
        in_specs=[
            of_start,
            of_rows(both_ways, visits.loads, rows),
            specs(_ONE, 1, visits.in_first, d_ends),
            of_rows(in_reverse, visits.loads, d_y),
        ],
        out_specs=[
            of_rows(in_reverse, visits.stores, rows),
            visits.of_given(visits.in_last, given),
        ],
        out_shape=[wide(rows, 2), wide(given, 1)],
        scratch_shapes=[
            *(scratch(one), scratch(state_shapes(visits.heads, state)), many),
            *(visits.turned(rows), visits.turned(d_y)),
        ],
        name=f"{sweep.name}_backward",
        dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
        vmem_bytes=sweep.backward_bytes,
    )(
        wide(given, 1) if starts is None else wide(starts, 2),
        *(wide(rows, 2), wide(d_ends, 1), wide(d_y, 2)),
    )
    return reshaped(d_given, given), reshaped(d_rows, rows)


def _of_one(tree: Any) -> Any:
    """The shapes of one unit's arrays."""
    return jax.tree.map(lambda x: shaped(x, (1, *x.shape[1:])), tree)


def _per_unit(edge: Callable[[Any], Any], tree: Any, units: int) -> Any:
    """Shapes (units, ...) of what a map of ``Edges`` returns."""
    shapes = jax.eval_shape(edge, _of_one(tree))
    return jax.tree.map(lambda x: shaped(x, (units, *x.shape[1:])), shapes)
