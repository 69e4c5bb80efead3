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

from memcache_jax._typing import Array
from memcache_jax.kernels._sweep_plan import Sweep, wide_shape
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
      rows: (units, chunks, ...).
      y: shapes of the outputs, (units, chunks, ...).
      starts: whether to write the states that groups start from; if not, None takes their place.
    """
    units, chunks = jax.tree.leaves(rows)[0].shape[:2]
    lengths = sweep.group * sweep.every, sweep.group
    of_runs, of_groups = (
        jax.tree.map(lambda x, n=n: _shaped(x, (units, chunks // n, *x.shape[1:])), state)
        for n in lengths
    )
    of_groups = of_groups if starts else None
    run, group = map(np.int32, lengths)
    of_chunk = functools.partial(_specs, sweep, 2, lambda i, c: (i, c))
    of_run = functools.partial(_specs, sweep, 2, lambda i, c: (i, lax.div(c, run)))
    of_group = functools.partial(_specs, sweep, 2, lambda i, c: (i, lax.div(c, group)))

    def kernel(state_refs, rows_refs, y_refs, end_refs, start_refs, carried_refs):
        chunk = pl.program_id(1)

        @pl.when(chunk == 0)
        def _():
            _fill(carried_refs, _load(state_refs, state, 1))

        before = _load(carried_refs, state, 1)
        if starts:

            @pl.when(lax.rem(chunk, group) == 0)
            def _():
                _fill(start_refs, before)

        after, outputs = step(before, _load(rows_refs, rows, 2))
        _fill(y_refs, outputs)
        _fill(carried_refs, after)

        @pl.when(lax.rem(chunk, run) == run - 1)
        def _():
            _fill(end_refs, after)

    out, ends, first = tpu_call(
        kernel,
        grid=(units // sweep.together, chunks),
        in_specs=[_specs(sweep, 1, lambda i, c: (i,), state), of_chunk(rows)],
        out_specs=[of_chunk(y), of_run(of_runs), of_group(of_groups)],
        out_shape=[_wide(y, 2), _wide(of_runs, 2), _wide(of_groups, 2)],
        scratch_shapes=[_scratch(sweep, state)],
        name=f"{sweep.name}_forward",
        dimension_semantics=("parallel", "arbitrary"),
        vmem_bytes=sweep.forward_bytes,
    )(_wide(state, 1), _wide(rows, 2))
    return _reshaped(ends, of_runs), _reshaped(out, y), _reshaped(first, of_groups)


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
    units, chunks = jax.tree.leaves(rows)[0].shape[:2]
    groups, length = chunks // sweep.group, sweep.group
    state = jax.tree.map(lambda x: _shaped(x, (units, *x.shape[2:])), starts)

    def both_ways(i: Any, j: Any, s: Any) -> tuple:
        return i, (groups - 1 - j) * length + jnp.minimum(s, 2 * length - 1 - s)

    def in_reverse(i: Any, j: Any, s: Any) -> tuple:
        return i, (groups - 1 - j) * length + jnp.minimum(length - 1, 2 * length - 1 - s)

    def of_rows(late: bool, x: Any) -> pl.BlockSpec:
        return _specs(sweep, 2, in_reverse if late else both_ways, x)

    of_chunk = functools.partial(_specs, sweep, 2, in_reverse)
    of_start = functools.partial(_specs, sweep, 2, lambda i, j, s: (i, groups - 1 - j))
    of_end = functools.partial(
        _specs, sweep, 2, lambda i, j, s: (i, lax.div(groups - 1 - j, np.int32(sweep.every)))
    )

    def kernel(
        start_refs, rows_refs, d_end_refs, d_y_refs, d_rows_refs, d_state_refs,
        carried_refs, d_carried_refs, starts_refs,
    ):  # fmt: skip
        j, s = pl.program_id(1), pl.program_id(2)

        @pl.when(s == 0)
        def _():
            _fill(carried_refs, _load(start_refs, starts, 2))

        @pl.when((s == 0) & (j == 0))
        def _():
            _fill(d_carried_refs, jax.tree.map(jnp.zeros_like, _load(d_carried_refs, state, 1)))

        @pl.when((s == 0) & (lax.rem(j, np.int32(sweep.every)) == 0))
        def _():
            d_carried, d_end = _load(d_carried_refs, state, 1), _load(d_end_refs, d_ends, 2)
            _fill(d_carried_refs, jax.tree.map(jnp.add, d_carried, d_end))

        @pl.when(s < length)
        def _():
            carried = _load(carried_refs, state, 1)
            jax.tree.map(lambda ref, x: _put(ref, s, x), starts_refs, carried)

        @pl.when(s < length - 1)
        def _():
            carried = _load(carried_refs, state, 1)
            _fill(carried_refs, step(carried, _load(rows_refs, rows, 2))[0])

        @pl.when(s >= length)
        def _():
            place = 2 * length - 1 - s
            start = jax.tree.map(
                lambda ref, x: ref[place].reshape(sweep.together, *x.shape[1:]), starts_refs, state
            )
            d_carried, d_rows = pull(
                start,
                _load(rows_refs, rows, 2),
                _load(d_carried_refs, state, 1),
                _load(d_y_refs, d_y, 2),
            )
            _fill(d_carried_refs, d_carried)
            _fill(d_rows_refs, d_rows)
            _fill(d_state_refs, d_carried)

    many = jax.tree.map(
        lambda x: pltpu.VMEM((length, *x.shape), x.dtype), _scratch_shapes(sweep, state)
    )
    d_rows, d_state = tpu_call(
        kernel,
        grid=(units // sweep.together, groups, 2 * length),
        in_specs=[
            of_start(starts),
            jax.tree.map(of_rows, late, rows),
            of_end(d_ends),
            of_chunk(d_y),
        ],
        out_specs=[of_chunk(rows), _specs(sweep, 1, lambda i, j, s: (i,), state)],
        out_shape=[_wide(rows, 2), _wide(state, 1)],
        scratch_shapes=[_scratch(sweep, state), _scratch(sweep, state), many],
        name=f"{sweep.name}_backward",
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_bytes=sweep.backward_bytes,
    )(_wide(starts, 2), _wide(rows, 2), _wide(d_ends, 2), _wide(d_y, 2))
    return _reshaped(d_state, state), _reshaped(d_rows, rows)


def _reshaped(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, like: x.reshape(like.shape), tree, like)


def _shaped(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype)


def _wide(tree: Any, lead: int) -> Any:
    def wide(x: Any) -> Any:
        shape = wide_shape(x, lead)
        return x.reshape(shape) if isinstance(x, Array) else _shaped(x, shape)

    return jax.tree.map(wide, tree)


def _specs(sweep: Sweep, lead: int, index: Callable[..., tuple], tree: Any) -> Any:
    """Blocks of some memories, and of one chunk or group if ``lead`` is 2."""

    def spec(x: Any) -> pl.BlockSpec:
        rest = wide_shape(x, lead)[lead:]
        block = (sweep.together, *[1] * (lead - 1), *rest)
        return pl.BlockSpec(block, lambda *place: (*index(*place), *[0] * len(rest)))

    return jax.tree.map(spec, tree)


def _scratch_shapes(sweep: Sweep, state: Any) -> Any:
    return jax.tree.map(lambda x: _shaped(x, (sweep.together, *wide_shape(x, 1)[1:])), state)


def _scratch(sweep: Sweep, state: Any) -> Any:
    return jax.tree.map(lambda x: pltpu.VMEM(x.shape, x.dtype), _scratch_shapes(sweep, state))


def _load(refs: Any, like: Any, lead: int) -> Any:
    """The blocks of ``refs`` as arrays (together, ...), in float32."""

    def load(ref: Any, x: Any) -> Array:
        return ref[...].reshape(ref.shape[0], *x.shape[lead:]).astype(jnp.float32)

    return jax.tree.map(load, refs, like)


def _fill(refs: Any, arrays: Any) -> None:
    """Fills blocks with arrays of the same size."""

    def fill(ref: Any, x: Array) -> None:
        ref[...] = x.reshape(ref.shape).astype(ref.dtype)

    jax.tree.map(fill, refs, arrays)


def _put(ref: Any, place: Any, x: Array) -> None:
    ref[place] = x.reshape(ref.shape[1:])
