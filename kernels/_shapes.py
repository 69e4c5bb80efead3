"""Shapes and dtypes that kernels take, and whether a state fits into a Triton program."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Matrices

_COMFORTABLE_STATE = 2**14  # numbers of one matrix that a Triton program keeps with hardly a spill


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``size`` and ``least``."""
    return 1 << (max(size, least) - 1).bit_length()


def pad_to(x: Array, shape: Sequence[int]) -> Array:
    """Returns ``x`` with its last axes padded to this shape, by zeros at their ends."""
    lead = x.ndim - len(shape)
    ends = [(0, 0)] * lead + [
        (0, to - size) for to, size in zip(shape, x.shape[lead:], strict=True)
    ]
    return jnp.pad(x, ends) if any(end for _, end in ends) else x


def cut(x: Array, like: Array) -> Array:
    """Returns a padded array cut back to the shape of ``like``, in its dtype."""
    return x[tuple(slice(size) for size in like.shape)].astype(like.dtype)


def dtype_reasons(*arrays: Array) -> list[tuple[bool, str]]:
    """Refuses dtypes that no kernel takes, for ``check_served``."""
    names = sorted({x.dtype.name for x in arrays})
    return [(not {*names} <= {"bfloat16", "float32"}, f"dtypes {names}, not bfloat16 or float32")]


def fits_triton(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a Triton program can keep matrices of these shapes, and their reads, in registers."""
    # Each layer's rows need registers too, so that two layers leave room for half as much.
    return len(shapes) * padded_size(shapes) <= _COMFORTABLE_STATE


def padded_size(shapes: Sequence[tuple[int, ...]]) -> int:
    """Numbers in arrays of these shapes, each axis padded to a power of two."""
    return sum(math.prod(map(power_of_two, shape)) for shape in shapes)


def read_shape(
    read: Callable[..., Array], bank: Matrices, query: Array, lead: int = 2
) -> jax.ShapeDtypeStruct:
    """Shape and dtype that a block of rows reads from one state.

    Args:
      read: reads one state.
      bank: matrices (..., states, in, out).
      query: rows (..., c, k).
      lead: axes of ``bank`` before its states.
    """
    matrices = tuple(jax.ShapeDtypeStruct(m.shape[lead + 1 :], m.dtype) for m in bank)
    return jax.eval_shape(read, matrices, jax.ShapeDtypeStruct(query.shape[-2:], query.dtype))


def shape_key(bank: Matrices, rows: int) -> str:
    """Key for measured block sizes: number of states, rows of a block, shapes of a state."""
    shapes = "+".join(f"{m.shape[-2]}x{m.shape[-1]}" for m in bank)
    return f"n{bank[0].shape[-3]} c{rows} {shapes}"
