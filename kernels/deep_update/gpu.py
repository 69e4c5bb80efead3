"""The deep update on GPUs: Triton programs that each carry one memory through its chunks.

Only the states that chunks start from are made chunk by chunk, and backward their cotangents. A
state does not fit into registers. It stays where all states are returned, and a program passes over
it in tiles of hidden units (of keys, at depth 1): twice a chunk, for what the tiles need of each
other is the prediction alone, and backward the cotangent of its error.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

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
    shared_memory_reason,
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
    tiles, first, last = _tiles(given, blocks)

    def chunk(c: Array, form: Any, states: Any) -> None:
        key, value = form.key[0, c], form.value[0, c]

        def hidden(j: Array) -> tuple[Array, ...]:
            if not deep:
                return (form.key[0, c, *first(j)],)
            return _gelu(_product(key, states[0][0][0, c, *first(j)]), 1)

        def predict(j: Array, prediction: Array) -> Array:
            return prediction + _product(hidden(j)[0], states[0][-1][0, c, *last(j)])

        prediction = for_each(tiles, predict, key if deep else jnp.zeros_like(value))
        error = jax.grad(loss)(prediction, value)

        def write(layer: int, place: tuple, x: Array, delta: Array) -> None:
            before = [states[p][layer][0, c, *place] for p in parts]
            for p in parts:
                kept = sum(form.decay[0, c, p, q] * before[q] for q in parts[p:])
                change = _product(x.T, form.mixing[0, c, p][:, None] * delta)
                states[p][layer][0, c + 1, *place] = kept - change

        def write_tile(j: Array, _: None) -> None:
            h, *slope = hidden(j)
            if deep:
                delta = _product(error, states[0][-1][0, c, *last(j)].T) * slope[0]
                write(0, first(j), key, delta)
            write(-1, last(j), h, error)

        for_each(tiles, write_tile, None)

    return _call("deep_update_forward", chunk, lambda i: i, goes_on, form, given, blocks)


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
    tiles, first, last = _tiles(d_starts, blocks)

    def chunk(c: Array, operands: Any, d_states: Any) -> None:
        form, weights = operands
        key, value = form.key[0, c], form.value[0, c]

        def hidden(j: Array) -> tuple[Array, ...]:
            if not deep:
                return (form.key[0, c, *first(j)],)
            return _gelu(_product(key, weights[0][0, c, *first(j)]), 2)

        def d_after(layer: int, place: tuple) -> list[Array]:
            return [d_states[p][layer][0, c + 1, *place] for p in parts]

        def mixed(p: int, x: Array) -> Array:
            return form.mixing[0, c, p][:, None] * x

        def d_delta(x: Array, after: list[Array]) -> Array:
            """Of a layer with the inputs x."""
            return -sum(mixed(p, _product(x, after[p])) for p in parts)

        def predict(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            prediction, d_error = carry
            (h, *slopes), matrix = hidden(j), weights[-1][0, c, *last(j)]
            d_error += d_delta(h, d_after(-1, last(j)))
            if deep:
                d_error += _product(d_delta(key, d_after(0, first(j))) * slopes[0], matrix)
            return prediction + _product(h, matrix), d_error

        zero = jnp.zeros_like(value)
        prediction, d_error = for_each(tiles, predict, (key if deep else zero, zero))
        error, d_prediction = jax.jvp(
            lambda prediction: jax.grad(loss)(prediction, value), (prediction,), (d_error,)
        )

        def add(layer: int, place: tuple, after: list[Array], of_weights: Array) -> None:
            for p in parts:
                kept = sum(form.decay[0, c, q, p] * after[q] for q in parts[: p + 1])
                d_states[p][layer][0, c, *place] += kept if p else kept + of_weights

        def pull_tile(j: Array, _: None) -> None:
            h, *slopes = hidden(j)
            after = d_after(-1, last(j))
            of_weights = _product(h.T, d_prediction)
            if deep:
                matrix, after_first = weights[-1][0, c, *last(j)], d_after(0, first(j))
                d_first = d_delta(key, after_first)
                of_weights += _product((d_first * slopes[0]).T, error)
                d_h = _product(d_prediction, matrix.T)
                d_h -= sum(_product(mixed(p, error), after[p].T) for p in parts)
                d_z = d_h * slopes[0] + d_first * _product(error, matrix.T) * slopes[1]
                add(0, first(j), after_first, _product(key.T, d_z))
            add(-1, last(j), after, of_weights)

        for_each(tiles, pull_tile, None)

    return _call(
        *("deep_update_backward", chunk, lambda i: chunks - 2 - i),
        *(goes_on, (form, weights), d_starts, blocks),
    )


def _gelu(x: Array, order: int) -> tuple[Array, ...]:
    """gelu(x), and its derivatives up to an order."""
    if not order:
        return (jax.nn.gelu(x),)
    values, slopes = jax.jvp(lambda x: _gelu(x, order - 1), (x,), (jnp.ones_like(x),))
    return (*values, slopes[-1])


def _tiles(state: Parts, blocks: Blocks) -> tuple[int, Callable, Callable]:
    """How many tiles there are, and the place of one in the first layer and in the last one.

    At depth 1 the former is that of its channels in the keys.
    """
    every = state[0][-1].shape[2]
    size = min(blocks.units, every)

    def units(j: Array) -> Any:
        return pl.ds(j * size, size)

    return every // size, lambda j: (slice(None), units(j)), lambda j: (units(j), slice(None))


def _call(
    name: str,
    chunk: Callable[[Array, Any, Any], None],
    order: Callable[[Array], Array],
    goes_on: Array,
    operands: Any,
    states: Parts,
    blocks: Blocks,
) -> Parts:
    """Runs one program for each memory, which changes its states in place.

    Args:
      name: the kernel's name.
      chunk: what it does for chunk c of those after which the memory goes on, with references to
        the operands and to the states.
      order: the chunks, all but the last one, by step.
      goes_on: as for ``deep_update``.
      operands: arrays (units, chunks, ...).
      states: arrays (units, chunks, ...).
      blocks: how a program runs.
    """
    units, chunks = goes_on.shape
    if chunks == 1:
        return states

    def kernel(goes_on_ref: Any, operands_refs: Any, _: Any, states_refs: Any) -> None:
        def step(i: Array, _: None) -> None:
            c = order(i)

            @pl.when(goes_on_ref[0, c + 1] > 0)
            def _():
                chunk(c, operands_refs, states_refs)

            # The next step reads what other threads of this program have stored: a barrier orders
            # their accesses to global memory too. Nothing else needs one. Within a step no tile is
            # read that another has written, loads in flight are those of one loop over tiles, and
            # no other program has the same memory.
            triton_barrier()

        for_each(chunks - 1, step, None)

    def of_unit(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, *x.shape[1:]), lambda u: (u, *[0] * len(x.shape[1:])))

    arguments = (goes_on.astype(jnp.int32), operands, states)
    others = len(jax.tree.leaves(arguments[:2]))
    (out,) = triton_call(
        kernel,
        grid=(units,),
        in_specs=jax.tree.map(of_unit, arguments),
        out_specs=[jax.tree.map(of_unit, states)],
        out_shape=[jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states)],
        input_output_aliases={others + i: i for i in range(len(jax.tree.leaves(states)))},
        name=name,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )(*arguments)
    return out


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
