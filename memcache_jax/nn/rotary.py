"""Rotary positions, exact at any distance from the start."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Float, Int

_TABLE = 2**16  # angles whose cosines and sines are constants of a program: CPUs are slow at them
_UNIT = 2 * np.pi / 2**32


def rotate(
    x: Float[Array, "b t h k"], base: float, position: Int[Array, "_ t"] | None = None
) -> Float[Array, "b t h k"]:
    """Rotary embedding (arXiv:2104.09864): the pair (i, i + k/2) turns by t base^(-2i/k)."""
    length, half = x.shape[1], x.shape[-1] // 2
    if position is None and length * half <= _TABLE:
        turned = np.arange(length, dtype=np.uint64)[None, :, None] * _turns(base, half)
        angles = (turned >> 32).astype(np.uint32).view(np.int32) * _UNIT
        tables = np.cos(angles), np.sin(angles)
    else:
        position = jnp.arange(length)[None] if position is None else position
        angle = _angles(position, base, half).astype(jnp.promote_types(x.dtype, jnp.float32))
        tables = jnp.cos(angle), jnp.sin(angle)
    cos, sin = (jnp.asarray(table, x.dtype)[:, :, None] for table in tables)
    return turn_pairs(x, cos, sin)


def turn_pairs(
    x: Float[Array, "b t h k"], cos: Float[Array, "_ t _ r"], sin: Float[Array, "_ t _ r"]
) -> Float[Array, "b t h k"]:
    """Turns the pair (i, i + k/2) of each row by the angle with this cosine and sine."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _angles(position: Int[Array, "_ t"], base: float, half: int) -> Float[Array, "_ t half"]:
    """Angles t base^(-i/half), less whole turns.

    As a float, t base^(-i/half) would lose what is left of it after whole turns. As an integer in
    units of 2^-32 turns it is t times 64 bits of turns per token, and overflow drops whole turns.
    """
    whole = _turns(base, half)
    high, low = (jnp.asarray(x, jnp.uint32)[None, None] for x in (whole >> 32, whole & 0xFFFFFFFF))
    t = position.astype(jnp.uint32)[..., None]
    phase = lax.bitcast_convert_type(t * high + _high_product(t, low), jnp.int32)
    return phase.astype(jnp.result_type(float)) * _UNIT


def _turns(base: float, half: int) -> np.ndarray:
    """Turns per token of each pair, less whole ones, in units of 2^-64."""
    turns = base ** (-np.arange(half) / half) / (2 * np.pi) % 1.0
    return (turns * 2.0**64).astype(np.uint64)


def _high_product(x: Array, y: Array) -> Array:
    """The upper 32 bits of the product of two numbers of 32 bits, by digits of 16."""
    digit = 0xFFFF
    middle = (x >> 16) * (y & digit) + ((x & digit) * (y & digit) >> 16)
    other = (x & digit) * (y >> 16) + (middle & digit)
    return (x >> 16) * (y >> 16) + (middle >> 16) + (other >> 16)
