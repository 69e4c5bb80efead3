"""Triton programs that each carry one memory through its chunks.

A state does not fit into registers. It stays in global memory, where all states are returned, and a
program passes over it in tiles of hidden units, or of keys at depth 1. Tiles share the prediction
and, backward, the cotangent of its error, both of them sums over tiles.

What a pass keeps for the next one is in global memory too, as scratch: a loop holds few numbers in
registers, and loads the rest where it needs them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from memcache_jax._typing import Array, Matrices
from memcache_jax.kernels._triton import for_each, triton_barrier, triton_call
from memcache_jax.kernels.deep_update.form import DescentChunk, Loss, Parts

_product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a program runs.

    Attributes:
      units: hidden units of a tile, a power of two from 16 on.
      num_warps: its warps.
      num_stages: loads in flight.
    """

    units: int
    num_warps: int
    num_stages: int


def starts_of(
    form: DescentChunk, goes_on: Array, given: Parts, loss: Loss, blocks: Blocks
) -> Parts:
    """Returns the states that chunks start from, which overwrite the given ones.

    All arrays are float32, with sizes that are powers of two.
    """
    deep, parts, chunks = len(given[0]) > 1, range(len(given)), goes_on.shape[1]
    tiles = _tiles(given, blocks)

    def chunk(c: Array, form: Any, states: Any, error: Any, entered: Any = None) -> None:
        def matrix(part: int, layer: int, j: Array) -> Array:
            return states[part][layer][0, c, *tiles.place(layer, j)]

        hidden = functools.partial(_hidden, tiles, deep, form, c, entered)

        def enter(j: Array, _: None) -> None:
            entered[0, j] = _product(form.key[0, c], matrix(0, 0, j))

        def predict(j: Array, prediction: Array) -> Array:
            return prediction + _product(hidden(j)[0], matrix(0, -1, j))

        def write(layer: int, j: Array, change: Callable[[Array], Array]) -> None:
            for p in parts:
                after = -change(form.mixing[0, c, p][:, None])
                for q in parts[p:]:
                    after += form.decay[0, c, p, q] * matrix(q, layer, j)
                states[p][layer][0, c + 1, *tiles.place(layer, j)] = after

        def write_first(j: Array, _: None) -> None:
            delta = _product(error[0, 0], matrix(0, -1, j).T) * hidden(j, 1)[1]
            write(0, j, lambda mixing: _product(form.key[0, c].T, mixing * delta))

        def write_last(j: Array, _: None) -> None:
            (h,) = hidden(j)
            write(-1, j, lambda mixing: _product((mixing * h).T, error[0, 0]))

        prediction = jnp.zeros_like(form.value[0, c])
        if deep:
            for_each(tiles.number, enter, None)
            triton_barrier()
            prediction = form.key[0, c]
        prediction = for_each(tiles.number, predict, prediction)
        error[0, 0] = _slope(loss, c, prediction, form.value[0, c])
        triton_barrier()
        if deep:
            for_each(tiles.number, write_first, None)
        for_each(tiles.number, write_last, None)

    rows, values = form.value.shape[2:]
    scratch = [(1, rows, values), *[(tiles.number, rows, tiles.size)] * deep]
    every = range(chunks - 1)
    return _call("deep_update_forward", chunk, every, goes_on, form, given, scratch, blocks)


def d_starts_of(
    form: DescentChunk,
    goes_on: Array,
    weights: Matrices,
    d_starts: Parts,
    loss: Loss,
    blocks: Blocks,
) -> Parts:
    """Returns the cotangents of the states that chunks start from, which overwrite the reads'."""
    deep, parts, chunks = len(weights) > 1, range(len(d_starts)), goes_on.shape[1]
    tiles = _tiles(d_starts, blocks)

    def chunk(
        c: Array,
        operands: Any,
        d_states: Any,
        errors: Any,
        entered: Any = None,
        d_delta: Any = None,
    ) -> None:
        form, weights = operands

        def matrix(layer: int, j: Array) -> Array:
            return weights[layer][0, c, *tiles.place(layer, j)]

        def d_after(part: int, layer: int, j: Array) -> Array:
            return d_states[part][layer][0, c + 1, *tiles.place(layer, j)]

        def mixing(p: int) -> Array:
            return form.mixing[0, c, p][:, None]

        hidden = functools.partial(_hidden, tiles, deep, form, c, entered)

        def enter(j: Array, _: None) -> None:
            entered[0, j] = _product(form.key[0, c], matrix(0, j))
            every = (mixing(p) * _product(form.key[0, c], d_after(p, 0, j)) for p in parts)
            d_delta[0, j] = -sum(every)

        def predict(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            prediction, d_error = carry
            h, *slopes = hidden(j, int(deep))
            prediction += _product(h, matrix(-1, j))
            for p in parts:
                d_error += _product(-mixing(p) * h, d_after(p, -1, j))
            if deep:
                d_error += _product(d_delta[0, j] * slopes[0], matrix(-1, j))
            return prediction, d_error

        def pull(layer: int, j: Array, of_weights: Array) -> None:
            for p in parts:
                total = 0.0 if p else of_weights
                for q in parts[: p + 1]:
                    total += form.decay[0, c, q, p] * d_after(q, layer, j)
                d_states[p][layer][0, c, *tiles.place(layer, j)] += total

        def pull_first(j: Array, _: None) -> None:
            slope, curvature = hidden(j, 2)[1:]
            d_h = _product(errors[0, 1], matrix(-1, j).T)
            for p in parts:
                d_h -= mixing(p) * _product(errors[0, 0], d_after(p, -1, j).T)
            d_slope = d_delta[0, j] * _product(errors[0, 0], matrix(-1, j).T)
            pull(0, j, _product(form.key[0, c].T, d_h * slope + d_slope * curvature))

        def pull_last(j: Array, _: None) -> None:
            h, *slopes = hidden(j, int(deep))
            of_weights = _product(h.T, errors[0, 1])
            if deep:
                of_weights += _product((d_delta[0, j] * slopes[0]).T, errors[0, 0])
            pull(-1, j, of_weights)

        prediction = d_error = jnp.zeros_like(form.value[0, c])
        if deep:
            for_each(tiles.number, enter, None)
            triton_barrier()
            prediction = form.key[0, c]
        prediction, d_error = for_each(tiles.number, predict, (prediction, d_error))
        errors[0, 0], errors[0, 1] = jax.jvp(
            lambda x: _slope(loss, c, x, form.value[0, c]), (prediction,), (d_error,)
        )
        triton_barrier()
        if deep:
            for_each(tiles.number, pull_first, None)
        for_each(tiles.number, pull_last, None)

    rows, values = form.value.shape[2:]
    scratch = [(2, rows, values), *[(tiles.number, rows, tiles.size)] * 2 * deep]
    every, operands = range(chunks - 2, -1, -1), (form, weights)
    return _call("deep_update_backward", chunk, every, goes_on, operands, d_starts, scratch, blocks)


class _Tiles(NamedTuple):
    """Hidden units in tiles; at depth 1, keys."""

    number: int
    size: int

    def place(self, layer: int, j: Array) -> tuple:
        """Index of tile j in the last layer (-1), or in what feeds that layer (0)."""
        units = pl.ds(j * self.size, self.size)
        return (units, slice(None)) if layer else (slice(None), units)


def _slope(loss: Loss, c: Array, prediction: Array, value: Array) -> Array:
    """The loss's gradient with respect to the prediction, in chunk c."""
    # Not the constant 1 of ``jax.grad``: Triton's lowering cannot negate a constant.
    one = (c >= 0).astype(jnp.float32)
    return jax.vjp(lambda x: loss(x, value), prediction)[1](one)[0]


def _hidden(
    tiles: _Tiles, deep: bool, form: Any, c: Array, entered: Any, j: Array, order: int = 0
) -> tuple[Array, ...]:
    """What a tile feeds the last layer, and at depth 2 its derivatives up to an order."""
    if deep:
        return _gelu_and_slopes(entered[0, j], order)
    return (form.key[0, c, *tiles.place(0, j)],)


def _gelu_and_slopes(x: Array, order: int) -> tuple[Array, ...]:
    """gelu(x), and its derivatives up to an order."""
    if not order:
        return (jax.nn.gelu(x),)
    values, slopes = jax.jvp(lambda x: _gelu_and_slopes(x, order - 1), (x,), (jnp.ones_like(x),))
    return (*values, slopes[-1])


def _tiles(state: Parts, blocks: Blocks) -> _Tiles:
    units = state[0][-1].shape[2]
    size = min(blocks.units, units)
    return _Tiles(units // size, size)


def _call(
    name: str,
    chunk: Callable[..., None],
    every: range,
    goes_on: Array,
    operands: Any,
    states: Parts,
    scratch: Sequence[tuple[int, ...]],
    blocks: Blocks,
) -> Parts:
    """Runs one program per memory, which changes the memory's states in place.

    Args:
      name: the kernel's name.
      chunk: the program's work for a chunk c after which the memory goes on, given references to
        the operands, the states and the scratch.
      every: the chunks in the order of visits, all but the last one.
      goes_on: as for ``deep_update``.
      operands: arrays (units, chunks, ...).
      states: arrays (units, chunks, ...).
      scratch: shapes of a program's scratch.
      blocks: how a program runs.
    """
    if not every:
        return states
    units = len(goes_on)

    def kernel(
        goes_on_ref: Any, operands_refs: Any, _: Any, states_refs: Any, *scratch: Any
    ) -> None:
        def step(i: Array, _: None) -> None:
            c = every.start + every.step * i

            @pl.when(goes_on_ref[0, c + 1] > 0)
            def _():
                chunk(c, operands_refs, states_refs, *scratch)

            # Triton does not order one thread's loads after another's stores. A barrier, which
            # orders accesses to global memory too, stands wherever a pass reads what an earlier
            # one stored: within a chunk for the scratch, and here for the states. Within a pass
            # no tile reads what another stored, so that loads of the next tiles may be in flight.
            # Programs share no memory.
            triton_barrier()

        for_each(len(every), step, None)

    def of_unit(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, *x.shape[1:]), lambda u: (u, *[0] * len(x.shape[1:])))

    arguments = (goes_on.astype(jnp.int32), operands, states)
    first = len(jax.tree.leaves(arguments[:2]))
    outputs = [states, *(jax.ShapeDtypeStruct((units, *shape), jnp.float32) for shape in scratch)]
    states, *_ = triton_call(
        kernel,
        grid=(units,),
        in_specs=jax.tree.map(of_unit, arguments),
        out_specs=jax.tree.map(of_unit, outputs),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs),
        input_output_aliases={first + i: i for i in range(len(jax.tree.leaves(states)))},
        name=name,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )(*arguments)
    return states
