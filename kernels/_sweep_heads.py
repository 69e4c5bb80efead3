"""TPU kernels that keep large states in VMEM and read tokens in the model's layout.

As ``_sweep``, for states of which few fit into VMEM. A block of tokens has all heads of a chunk.
A program transposes the tokens of a group of chunks into VMEM, carries one head after another
through the group, and then transposes the results back. So tokens are not transposed in HBM, and a
program holds a single state for each head, the carried one. Rows are (units, chunks, ...), or
``Inside`` for tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memcache_jax.kernels._sweep import Pull, Step
from memcache_jax.kernels._sweep_blocks import (
    fill,
    is_inside,
    load,
    mapped,
    reshaped,
    shaped,
    specs,
    state_shapes,
    units_first,
    wide,
)
from memcache_jax.kernels._sweep_plan import Sweep
from memcache_jax.kernels._tpu import tpu_call

_ALL, _ONE = slice(None), 1


class _Steps(NamedTuple):
    """The steps of a group: loads, the visits of each head, and stores."""

    length: int
    heads: int
    visits: int

    @property
    def number(self) -> int:
        return 2 * self.length + self.heads * self.visits

    def loads(self, s: Any) -> Any:
        """The chunk of the group that step s transposes into VMEM, or the last one."""
        return jnp.minimum(s, self.length - 1)

    def head(self, s: Any) -> Any:
        """The head that step s visits, or the nearest."""
        head = lax.div(s - np.int32(self.length), np.int32(self.visits))
        return jnp.clip(head, 0, self.heads - 1)

    def visit(self, s: Any) -> Any:
        """Which visit of the head it is, or the nearest."""
        return jnp.clip(s - self.length - self.head(s) * self.visits, 0, self.visits - 1)

    def stores(self, s: Any) -> Any:
        """The chunk whose results step s transposes back, or the first one."""
        return jnp.clip(s - self.length - self.heads * self.visits, 0, self.length - 1)

    def when(self, s: Any, load: Callable, visit: Callable, store: Callable) -> None:
        """Calls the action of step s, with its chunk, or its head and visit."""
        visited = self.length + self.heads * self.visits
        pl.when(s < self.length)(lambda: load(self.loads(s)))
        pl.when((s >= self.length) & (s < visited))(lambda: visit(self.head(s), self.visit(s)))
        pl.when(s >= visited)(lambda: store(self.stores(s)))


def forward(
    sweep: Sweep, step: Step, state: Any, rows: Any, y: Any, *, starts: bool = True
) -> tuple[Any, Any, Any]:
    """As ``_sweep.forward``."""
    apart = units_first(rows)
    units, chunks = jax.tree.leaves(apart)[0].shape[:2]
    steps = _Steps(sweep.group, sweep.together, sweep.group)
    groups, heads, every = chunks // sweep.group, sweep.together, np.int32(sweep.every)
    of_runs, of_groups = (
        jax.tree.map(lambda x, n=n: shaped(x, (units, n, *x.shape[1:])), state)
        for n in (groups // sweep.every, groups)
    )
    of_groups = of_groups if starts else None

    def unit(i: Any, s: Any) -> Any:
        return i * heads + steps.head(s)

    def at_first(i: Any, j: Any, s: Any) -> tuple:  # the states are read in the first group alone
        return (jnp.where(j == 0, unit(i, s), i * heads + heads - 1),)

    def at_end(i: Any, j: Any, s: Any) -> tuple:
        ends = lax.rem(j, every) == every - 1
        return jnp.where(ends, unit(i, s), i * heads), lax.div(j, every)

    of_rows = functools.partial(_of_rows, steps, steps.loads, lambda j, v: j * sweep.group + v)

    def kernel(state_refs, rows_refs, y_refs, end_refs, start_refs, carried, turned, y_turned):
        j, s = pl.program_id(1), pl.program_id(2)

        def visit(head: Any, visit: Any) -> None:
            at = pl.ds(head, 1)

            @pl.when((visit == 0) & (j == 0))
            def _():
                fill(carried, load(state_refs, state, 1, _ALL), at)

            before = load(carried, state, 1, at)
            if starts:

                @pl.when(visit == 0)
                def _():
                    fill(start_refs, before, _ALL)

            after, outputs = step(before, _rows_at(rows_refs, apart, turned, visit, head))
            _fill_at(y_turned, jax.tree.leaves(outputs), visit, head)
            fill(carried, after, at)

            @pl.when((visit == steps.visits - 1) & (lax.rem(j, every) == every - 1))
            def _():
                fill(end_refs, after, _ALL)

        steps.when(
            s,
            functools.partial(_turn, rows_refs, turned),
            visit,
            functools.partial(_turn_back, y_refs, y_turned),
        )

    out, ends, first = tpu_call(
        kernel,
        grid=(units // heads, groups, steps.number),
        in_specs=[specs(_ONE, 1, at_first, state), of_rows(rows)],
        out_specs=[
            _of_rows(steps, steps.stores, lambda j, v: j * sweep.group + v, y),
            specs(_ONE, 2, at_end, of_runs),
            specs(_ONE, 2, lambda i, j, s: (unit(i, s), j), of_groups),
        ],
        out_shape=[wide(y, 2), wide(of_runs, 2), wide(of_groups, 2)],
        scratch_shapes=[_carried(heads, state), _turned(steps, rows), _turned(steps, y)],
        name=f"{sweep.name}_forward",
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_bytes=sweep.forward_bytes,
    )(wide(state, 1), wide(rows, 2))
    return reshaped(ends, of_runs), reshaped(out, y), reshaped(first, of_groups)


def backward(
    sweep: Sweep, step: Step, pull: Pull, starts: Any, rows: Any, d_ends: Any, d_y: Any
) -> tuple[Any, Any]:
    """As ``_sweep.backward``; each head is carried through a group and then back through it."""
    apart, length, heads = units_first(rows), sweep.group, sweep.together
    units, chunks = jax.tree.leaves(apart)[0].shape[:2]
    groups, every = chunks // length, np.int32(sweep.every)
    steps = _Steps(length, heads, 2 * length)
    state = jax.tree.map(lambda x: shaped(x, (units, *x.shape[2:])), starts)

    def unit(i: Any, s: Any) -> Any:
        return i * heads + steps.head(s)

    def at_end(i: Any, j: Any, s: Any) -> tuple:  # read where a run ends, the first of its groups
        begins = lax.rem(j, every) == 0
        head = jnp.where(begins, unit(i, s), i * heads + heads - 1)
        return head, lax.div(groups - 1 - j, every)

    def at_first(i: Any, j: Any, s: Any) -> tuple:
        return (jnp.where(j == groups - 1, unit(i, s), i * heads),)

    def both_ways(j: Any, v: Any) -> Any:
        return (groups - 1 - j) * length + jnp.minimum(v, 2 * length - 1 - v)

    def in_reverse(j: Any, v: Any) -> Any:
        return (groups - 1 - j) * length + jnp.minimum(length - 1, 2 * length - 1 - v)

    def in_order(j: Any, v: Any) -> Any:
        return (groups - 1 - j) * length + v

    def of_rows(chunk: Callable, turns: Callable, tree: Any) -> Any:
        return _of_rows(steps, turns, chunk, tree, in_order)

    def kernel(
        start_refs, rows_refs, d_end_refs, d_y_refs, d_rows_refs, d_state_refs,
        carried, d_carried, many, turned, d_y_turned,
    ):  # fmt: skip
        j, s = pl.program_id(1), pl.program_id(2)

        def load_chunk(c: Any) -> None:
            _turn(rows_refs, turned, c)
            _turn(d_y_refs, d_y_turned, c)

        def visit(head: Any, v: Any) -> None:
            at, c = pl.ds(head, 1), jnp.minimum(v, 2 * length - 1 - v)

            @pl.when(v == 0)
            def _():
                fill(carried, load(start_refs, starts, 2, _ALL), _ALL)

            @pl.when((v == 0) & (j == 0))
            def _():
                fill(d_carried, jax.tree.map(jnp.zeros_like, load(carried, state, 1, _ALL)), at)

            @pl.when((v == 0) & (lax.rem(j, every) == 0))
            def _():
                d_before, d_end = load(d_carried, state, 1, at), load(d_end_refs, d_ends, 2, _ALL)
                fill(d_carried, jax.tree.map(jnp.add, d_before, d_end), at)

            @pl.when(v < length)
            def _():
                before = load(carried, state, 1, _ALL)
                fill(jax.tree.map(lambda ref: ref.at[c], many), before, _ALL)

            @pl.when(v < length - 1)
            def _():
                before = load(carried, state, 1, _ALL)
                fill(carried, step(before, _rows_at(rows_refs, apart, turned, c, head))[0], _ALL)

            @pl.when(v >= length)
            def _():
                d_after, d_rows = pull(
                    load(jax.tree.map(lambda ref: ref.at[c], many), state, 1, _ALL),
                    _rows_at(rows_refs, apart, turned, c, head),
                    load(d_carried, state, 1, at),
                    _rows_at(d_y_refs, units_first(d_y), d_y_turned, c, head),
                )
                fill(d_carried, d_after, at)
                fill(d_state_refs, d_after, _ALL)
                refs = jax.tree.leaves(d_rows_refs, is_leaf=is_inside)
                pairs = list(zip(refs, jax.tree.leaves(d_rows), strict=True))
                # The tokens of this chunk are not read again: their cotangents take their place.
                _fill_at(turned, [d for ref, d in pairs if is_inside(ref)], c, head)
                plain = [(ref, d) for ref, d in pairs if not is_inside(ref)]
                fill([ref for ref, _ in plain], [d for _, d in plain], _ALL)

        steps.when(s, load_chunk, visit, functools.partial(_turn_back, d_rows_refs, turned))

    many = jax.tree.map(
        lambda x: pltpu.VMEM((length, *x.shape), x.dtype), state_shapes(_ONE, state)
    )
    d_rows, d_state = tpu_call(
        kernel,
        grid=(units // heads, groups, steps.number),
        in_specs=[
            specs(_ONE, 2, lambda i, j, s: (unit(i, s), groups - 1 - j), starts),
            of_rows(both_ways, steps.loads, rows),
            specs(_ONE, 2, at_end, d_ends),
            of_rows(in_reverse, steps.loads, d_y),
        ],
        out_specs=[of_rows(in_reverse, steps.stores, rows), specs(_ONE, 1, at_first, state)],
        out_shape=[wide(rows, 2), wide(state, 1)],
        scratch_shapes=[
            *(_carried(_ONE, state), _carried(heads, state), many),
            *(_turned(steps, rows), _turned(steps, d_y)),
        ],
        name=f"{sweep.name}_backward",
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_bytes=sweep.backward_bytes,
    )(wide(starts, 2), wide(rows, 2), wide(d_ends, 2), wide(d_y, 2))
    return reshaped(d_state, state), reshaped(d_rows, rows)


def _of_rows(
    steps: _Steps, turns: Callable, chunk: Callable, tree: Any, in_order: Callable | None = None
) -> Any:
    """Blocks of one chunk: of all heads where a step ``turns`` it, or of the head of a visit."""

    def of(x: Any) -> Any:
        if is_inside(x):
            place = in_order or chunk
            return specs(steps.heads, 2, lambda i, j, s: (i, place(j, turns(s))), x)

        def index(i: Any, j: Any, s: Any) -> tuple:
            return i * steps.heads + steps.head(s), chunk(j, steps.visit(s))

        return specs(_ONE, 2, index, x)

    return mapped(of, tree)


def _carried(heads: int, state: Any) -> Any:
    return jax.tree.map(lambda x: pltpu.VMEM(x.shape, x.dtype), state_shapes(heads, state))


def _turned(steps: _Steps, tree: Any) -> list:
    """Vector memory (length, heads, m, k) for each array with heads inside."""
    arrays = [x.heads for x in jax.tree.leaves(tree, is_leaf=is_inside) if is_inside(x)]
    return [
        pltpu.VMEM((steps.length, steps.heads, x.shape[2], x.shape[4]), x.dtype) for x in arrays
    ]


def _inside(refs: Any) -> list:
    return [x.heads for x in jax.tree.leaves(refs, is_leaf=is_inside) if is_inside(x)]


def _turn(refs: Any, turned: list, c: Any) -> None:
    """Transposes blocks with heads inside into a chunk's place in VMEM."""
    for ref, into in zip(_inside(refs), turned, strict=True):
        into[c] = jnp.swapaxes(ref[0, 0].astype(jnp.float32), 0, 1).astype(into.dtype)


def _turn_back(refs: Any, turned: list, c: Any) -> None:
    """Transposes a chunk back into blocks with heads inside."""
    for ref, of in zip(_inside(refs), turned, strict=True):
        ref[0, 0] = jnp.swapaxes(of[c].astype(jnp.float32), 0, 1).astype(ref.dtype)


def _rows_at(refs: Any, like: Any, turned: list, c: Any, head: Any) -> Any:
    """The rows (1, ...) of a head in a chunk, in float32."""
    each = iter(turned)

    def of(ref: Any, x: Any) -> Any:
        block = next(each)[c, pl.ds(head, 1)] if is_inside(ref) else ref[...]
        return block.reshape(1, *x.shape[2:]).astype(jnp.float32)

    return mapped(of, refs, like)


def _fill_at(turned: list, arrays: list, c: Any, head: Any) -> None:
    for ref, x in zip(turned, arrays, strict=True):
        ref[c, pl.ds(head, 1)] = x.astype(ref.dtype)
