"""The blocks of a sweep's kernels: how arrays are cut, and what a kernel sees of them.

Arrays are (units, chunks, ...), one unit per memory. Arrays of tokens may also keep the layout that
models give them, ``Inside``. A program then takes some heads of one row and transposes its blocks
in VMEM, so that nothing is transposed in HBM.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memcache_jax._typing import Array


class Inside(NamedTuple):
    """An array (outer, chunks, m, heads, k), or its block, where units = outer * heads."""

    heads: Any


def is_inside(x: Any) -> bool:
    """Whether an array has heads inside."""
    return isinstance(x, Inside)


def mapped(function: Callable, *trees: Any) -> Any:
    """``jax.tree.map`` with ``Inside`` as leaves."""
    return jax.tree.map(function, *trees, is_leaf=is_inside)


def shaped(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The shape of an array of x's dtype."""
    return jax.ShapeDtypeStruct(shape, x.dtype)


def units_first(tree: Any) -> Any:
    """The shapes (units, chunks, ...) that arrays have, or would have."""

    def of(x: Any) -> jax.ShapeDtypeStruct:
        if not is_inside(x):
            return shaped(x, x.shape)
        outer, chunks, rows, heads, width = x.heads.shape
        return shaped(x.heads, (outer * heads, chunks, rows, width))

    return mapped(of, tree)


def wide_shape(x: Any, lead: int) -> tuple[int, ...]:
    """The shape of x with at least two axes after its first ``lead`` ones, as blocks need."""
    rest = x.shape[lead:]
    return (*x.shape[:lead], *[1] * (2 - len(rest)), *rest)


def wide(tree: Any, lead: int) -> Any:
    """Arrays, or their shapes, reshaped to ``wide_shape``."""

    def of(x: Any) -> Any:
        shape = wide_shape(x, lead)
        return x.reshape(shape) if isinstance(x, Array) else shaped(x, shape)

    return jax.tree.map(of, tree)


def reshaped(tree: Any, like: Any) -> Any:
    """Arrays in the shapes of others."""
    return jax.tree.map(lambda x, like: x.reshape(like.shape), tree, like)


def specs(together: int, lead: int, index: Callable[..., tuple], tree: Any) -> Any:
    """Blocks of some memories, and of one chunk or group if ``lead`` is 2."""

    def of_units(x: Any) -> pl.BlockSpec:
        rest = wide_shape(x, lead)[lead:]
        block = (together, *[1] * (lead - 1), *rest)
        return pl.BlockSpec(block, lambda *place: (*index(*place), *[0] * len(rest)))

    def of_heads(x: Any) -> pl.BlockSpec:
        _, _, rows, heads, width = x.shape
        parts = np.int32(heads // together)

        def at(*place: Any) -> tuple:
            i, chunk = index(*place)
            return lax.div(i, parts), chunk, 0, lax.rem(i, parts), 0

        return pl.BlockSpec((1, 1, rows, together, width), at)

    return mapped(lambda x: Inside(of_heads(x.heads)) if is_inside(x) else of_units(x), tree)


def state_shapes(together: int, state: Any) -> Any:
    """Shapes of the states of a program."""
    return jax.tree.map(lambda x: shaped(x, (together, *wide_shape(x, 1)[1:])), state)


def scratch(shapes: Any) -> Any:
    """Vector memory of these shapes."""
    return jax.tree.map(lambda x: pltpu.VMEM(x.shape, x.dtype), shapes)


def turned_scratch(together: int, tree: Any) -> list:
    """Vector memory (together, m, k) for each array with heads inside."""
    shapes = [x.heads.shape for x in jax.tree.leaves(tree, is_leaf=is_inside) if is_inside(x)]
    return [pltpu.VMEM((together, rows, width), jnp.float32) for _, _, rows, _, width in shapes]


def turn(refs: Any, turned: list, when: Any) -> None:
    """Transposes blocks with heads inside into ``turned``, each if its leaf of ``when`` is true."""
    pairs = zip(jax.tree.leaves(refs, is_leaf=is_inside), jax.tree.leaves(when), strict=True)
    blocks = [(ref.heads, condition) for ref, condition in pairs if is_inside(ref)]
    for (ref, condition), into in zip(blocks, turned, strict=True):

        @pl.when(condition)
        def _(ref=ref, into=into):
            into[...] = jnp.swapaxes(ref[0, 0].astype(jnp.float32), 0, 1)


def turn_back(refs: Any, turned: list) -> None:
    """Transposes ``turned`` back into blocks with heads inside."""
    blocks = [x.heads for x in jax.tree.leaves(refs, is_leaf=is_inside) if is_inside(x)]
    for ref, of in zip(blocks, turned, strict=True):
        ref[0, 0] = jnp.swapaxes(of[...], 0, 1).astype(ref.dtype)


def with_turned(refs: Any, turned: list) -> Any:
    """The references, with those of ``turned`` in place of blocks with heads inside."""
    each = iter(turned)
    return mapped(lambda ref: next(each) if is_inside(ref) else ref, refs)


def for_each_part(together: int, side: int, body: Callable[[Any], None]) -> None:
    """Calls ``body`` with the indices of ``side`` of a program's units at a time."""
    if side == together:
        body(slice(None))
        return

    @pl.loop(np.int32(0), np.int32(together // side))
    def _(part: Any) -> None:
        body(pl.ds(part * np.int32(side), side))


def load(refs: Any, like: Any, lead: int, at: Any) -> Any:
    """Units of blocks as arrays (side, ...), in float32."""

    def of(ref: Any, x: Any) -> Array:
        block = ref[at]
        return block.reshape(len(block), *x.shape[lead:]).astype(jnp.float32)

    return jax.tree.map(of, refs, like)


def fill(refs: Any, arrays: Any, at: Any) -> None:
    """Fills units of blocks with arrays of the same size."""

    def of(ref: Any, x: Array) -> None:
        ref[at] = x.reshape(len(x), *ref.shape[1:]).astype(ref.dtype)

    jax.tree.map(of, refs, arrays)
