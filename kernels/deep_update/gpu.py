"""The deep update on GPUs: Triton programs that each carry one memory through its chunks.

Only the states that chunks start from are made chunk by chunk, and backward their cotangents. A
state does not fit into registers. It stays where all states are returned, and a program passes over
it in tiles of hidden units (of keys, at depth 1): twice a chunk, for what the tiles need of each
other is the prediction alone, and backward the cotangent of its error.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from memcache_jax._typing import Array, Bool, Float, Matrices
from memcache_jax.kernels._block_sizes import block_sizes
from memcache_jax.kernels._dispatch import check_served
from memcache_jax.kernels._pallas import (
    dtype_reasons,
    filled_up,
    for_each,
    power_of_two,
    triton_barrier,
    triton_call,
)
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


def deep_update(
    form: DescentChunk, given: Parts, goes_on: Float[Array, "units chunks"], loss: Loss
) -> Parts:
    """See ``api.deep_update``."""
    check_served("deep_update", "pallas_gpu", dtype_reasons(*jax.tree.leaves((form, given))))
    shapes = "+".join("x".join(map(str, x.shape[2:])) for x in jax.tree.leaves(given))
    key = f"n{form.key.shape[1]} m{form.key.shape[2]} {shapes}"
    blocks = block_sizes(Blocks, "deep_update/pallas_gpu", key, form.key.dtype)

    @jax.custom_vjp
    def update(form: DescentChunk, given: Parts, goes_on: Array) -> Parts:
        return forward(form, given, goes_on)[0]

    def forward(form: DescentChunk, given: Parts, goes_on: Array) -> tuple[Parts, Any]:
        starts = _starts(_form(form), goes_on, _filled(given), loss, blocks)
        starts = _cut(starts, given)
        return starts, (form, starts, goes_on)

    def backward(residuals: Any, d_starts: Parts) -> tuple[DescentChunk, Parts, Array]:
        form, starts, goes_on = residuals
        weights, d_starts = _filled((starts[0], d_starts))
        d_starts = _cut(_d_starts(_form(form), goes_on, weights, d_starts, loss, blocks), starts)

        def ends(form: DescentChunk) -> Parts:
            before = jax.tree.map(lambda x: x[:, :-1], (form, starts))
            return jax.vmap(jax.vmap(lambda form, start: form.end(start, loss)))(*before)

        d_ends = jax.tree.map(lambda x: _where(goes_on[:, 1:] > 0, x[:, 1:]), d_starts)
        (d_form,) = jax.vjp(ends, form)[1](d_ends)
        d_given = jax.tree.map(lambda x: _where(goes_on == 0, x), d_starts)
        return d_form, d_given, jnp.zeros_like(goes_on)

    update.defvjp(forward, backward)
    return update(form, given, goes_on)


def _starts(form: DescentChunk, goes_on: Array, given: Parts, loss: Loss, blocks: Blocks) -> Parts:
    """The states that chunks start from, written over those given."""
    deep, parts = len(given[0]) > 1, range(len(given))
    tiles = _tiles(given, blocks)

    def chunk(c: Array, form: Any, states: Any, error: Any, entered: Any = None) -> None:
        def matrix(part: int, layer: int, j: Array) -> Array:
            return states[part][layer][0, c, *tiles.place(layer, j)]

        def hidden(j: Array, order: int = 0) -> tuple[Array, ...]:
            return _gelu(entered[0, j], order) if deep else (form.key[0, c, *tiles.place(0, j)],)

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
            for_each(tiles.count, enter, None)
            triton_barrier()
            prediction = form.key[0, c]
        prediction = for_each(tiles.count, predict, prediction)
        error[0, 0] = jax.grad(loss)(prediction, form.value[0, c])
        triton_barrier()
        if deep:
            for_each(tiles.count, write_first, None)
        for_each(tiles.count, write_last, None)

    rows, values = form.value.shape[2:]
    scratch = [(1, rows, values), *[(tiles.count, rows, tiles.size)] * deep]
    return _call(
        *("deep_update_forward", chunk, lambda i: i, goes_on, form, given, scratch, blocks)
    )


def _d_starts(
    form: DescentChunk,
    goes_on: Array,
    weights: Matrices,
    d_starts: Parts,
    loss: Loss,
    blocks: Blocks,
) -> Parts:
    """The cotangents of the states that chunks start from, added to those from their reads."""
    deep, parts = len(weights) > 1, range(len(d_starts))
    chunks = goes_on.shape[1]
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

        def hidden(j: Array, order: int = 0) -> tuple[Array, ...]:
            return _gelu(entered[0, j], order) if deep else (form.key[0, c, *tiles.place(0, j)],)

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
            _, slope, curvature = hidden(j, 2)
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
            for_each(tiles.count, enter, None)
            triton_barrier()
            prediction = form.key[0, c]
        prediction, d_error = for_each(tiles.count, predict, (prediction, d_error))
        errors[0, 0], errors[0, 1] = jax.jvp(
            lambda x: jax.grad(loss)(x, form.value[0, c]), (prediction,), (d_error,)
        )
        triton_barrier()
        if deep:
            for_each(tiles.count, pull_first, None)
        for_each(tiles.count, pull_last, None)

    rows, values = form.value.shape[2:]
    scratch = [(2, rows, values), *[(tiles.count, rows, tiles.size)] * 2 * deep]
    return _call(
        *("deep_update_backward", chunk, lambda i: chunks - 2 - i),
        *(goes_on, (form, weights), d_starts, scratch, blocks),
    )


def _gelu(x: Array, order: int) -> tuple[Array, ...]:
    """gelu(x), and its derivatives up to an order."""
    if not order:
        return (jax.nn.gelu(x),)
    values, slopes = jax.jvp(lambda x: _gelu(x, order - 1), (x,), (jnp.ones_like(x),))
    return (*values, slopes[-1])


class _Tiles(NamedTuple):
    """Hidden units in tiles; at depth 1, keys."""

    count: int
    size: int

    def place(self, layer: int, j: Array) -> tuple:
        """Of tile j in the last layer, -1, and in what gives it its inputs, 0."""
        units = pl.ds(j * self.size, self.size)
        return (units, slice(None)) if layer else (slice(None), units)


def _tiles(state: Parts, blocks: Blocks) -> _Tiles:
    units = state[0][-1].shape[2]
    size = min(blocks.units, units)
    return _Tiles(units // size, size)


def _call(
    name: str,
    chunk: Callable[..., None],
    order: Callable[[Array], Array],
    goes_on: Array,
    operands: Any,
    states: Parts,
    scratch: Sequence[tuple[int, ...]],
    blocks: Blocks,
) -> Parts:
    """Runs one program for each memory, which changes its states in place.

    Args:
      name: the kernel's name.
      chunk: what it does for a chunk c after which the memory goes on, with references to the
        operands, the states and the scratch.
      order: the chunks, all but the last one, by step.
      goes_on: as for ``deep_update``.
      operands: arrays (units, chunks, ...).
      states: arrays (units, chunks, ...).
      scratch: shapes of what a program keeps for itself.
      blocks: how a program runs.
    """
    units, chunks = goes_on.shape
    if chunks == 1:
        return states

    def kernel(
        goes_on_ref: Any, operands_refs: Any, _: Any, states_refs: Any, *scratch: Any
    ) -> None:
        def step(i: Array, _: None) -> None:
            c = order(i)

            @pl.when(goes_on_ref[0, c + 1] > 0)
            def _():
                chunk(c, operands_refs, states_refs, *scratch)

            # The next step reads what other threads of this program have stored: a barrier orders
            # their accesses to global memory too. Nothing else needs one. Within a step no tile is
            # read that another has written, loads in flight are those of one loop over tiles, and
            # no other program has the same memory.
            triton_barrier()

        for_each(chunks - 1, step, None)

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


def _form(form: DescentChunk) -> DescentChunk:
    """In float32, of sizes that are powers of two."""
    key, value = _filled((form.key, form.value))
    mixing = filled_up(form.mixing.astype(jnp.float32), (form.mixing.shape[2], key.shape[2]))
    return DescentChunk(key, value, form.decay.astype(jnp.float32), mixing)


def _filled(tree: Any) -> Any:
    """Arrays (units, chunks, rows, columns) in float32, of sizes that are powers of two."""

    def filled(x: Array) -> Array:
        return filled_up(x.astype(jnp.float32), tuple(map(power_of_two, x.shape[2:])))

    return jax.tree.map(filled, tree)


def _cut(tree: Any, like: Any) -> Any:
    def cut(x: Array, like: Array) -> Array:
        return x[tuple(slice(size) for size in like.shape)].astype(like.dtype)

    return jax.tree.map(cut, tree, like)


def _where(condition: Bool[Array, "units chunks"], x: Array) -> Array:
    """Zero elsewhere."""
    return jnp.where(condition.reshape(*condition.shape, *[1] * (x.ndim - 2)), x, 0)
