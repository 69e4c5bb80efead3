"""Rotations of queries and keys by angles that add up along a sequence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.rotary import turn_pairs
from memcache_jax.sharding.division import Division

_UNIT = 2.0**-32  # of a phase, in turns


@jax.custom_jvp
def angles(
    turns: Float[Array, "b t h r"], before: Float[Array, "b h r"], phase: Int[Array, "b h r"]
) -> Float[Array, "b t h r"]:
    """The angle after each token: 2 pi times the sum of all turns so far, less whole turns.

    Phases are summed as wrapping int32, so that rounding errors do not accumulate.

    Args:
      turns: of each token.
      before: the turns before the first token, for their gradient alone.
      phase: the same, less whole turns, in units of 2^-32 turns.
    """
    del before
    every = phase[:, None] + jnp.cumsum(_phase(turns), axis=1, dtype=jnp.int32)
    return every.astype(turns.dtype) * (2 * np.pi * _UNIT)


@angles.defjvp
def _angles_jvp(primals: tuple, tangents: tuple) -> tuple:
    turns, before, _ = tangents
    return angles(*primals), 2 * np.pi * (before[:, None] + jnp.cumsum(turns, axis=1))


def angles_of_parts(
    turns: Float[Array, "b t h r"], division: Division | None
) -> Float[Array, "b t h r"]:
    """The angles of a whole sequence, each part of it on its devices.

    What crosses the mesh is the sum of each part's turns.
    """
    division = None if division is None else division.even(turns.shape[1])
    if division is None or division.parts == 1:
        zero = jnp.zeros_like(turns[:, 0])
        return angles(turns, zero, zero.astype(jnp.int32))
    parts, axis = division.parts, division.time_axis

    def part(turns: Array) -> Array:
        sums = jnp.sum(_phase(turns), axis=1, dtype=jnp.int32), jnp.sum(turns, axis=1)
        earlier = (jnp.arange(parts) < lax.axis_index(axis)).reshape(-1, 1, 1, 1)
        phase, turned = (
            jnp.sum(jnp.where(earlier, x, 0), axis=0, dtype=x.dtype)
            for x in lax.all_gather(sums, axis)
        )
        return angles(turns, turned, phase)

    letters = "b t h ."
    return division.run(part, (turns,), (letters,), letters)


def next_angles(
    turns: Float[Array, "b t h r"], tail: Float[Array, "b 2 hr"], lengths: Int[Array, "b"]
) -> tuple[Float[Array, "b t h r"], Float[Array, "b 2 hr"]]:
    """The angles of a stream's next tokens, and the tail after the ``lengths`` that count.

    A tail is the turns before the next token, exactly, as a sum of two floats: multiples of 2^-16
    turns, which have the gradient, and the rest.
    """
    coarse, fine = (x.reshape(-1, *turns.shape[2:]) for x in jnp.moveaxis(tail, 1, 0))
    begun = _phase(coarse) + jnp.round(fine / _UNIT).astype(jnp.int32)
    angle = angles(turns, coarse.astype(turns.dtype), begun)

    def after(first: Array, steps: Array) -> Array:
        every = first[:, None] + jnp.cumsum(steps, axis=1, dtype=first.dtype)
        every = jnp.concatenate([first[:, None], every], axis=1)
        return jnp.take_along_axis(every, lengths[:, None, None, None], axis=1)[:, 0]

    phase, turned = after(begun, _phase(turns)), after(coarse, turns)
    parts = jnp.stack([(phase >> 16) * 2.0**-16, (phase & 0xFFFF) * _UNIT], axis=1)
    gradient = jnp.stack([turned - lax.stop_gradient(turned), jnp.zeros_like(turned)], axis=1)
    return angle, (parts + gradient).reshape(tail.shape).astype(tail.dtype)


def turned(
    rows: tuple[Float[Array, "b t h k"], ...],
    turns: Float[Array, "b t h r"],
    division: Division | None,
    tail: tuple[Float[Array, "b 2 hr"], Int[Array, "b"]] | None,
) -> tuple[tuple[Float[Array, "b t h k"], ...], Any]:
    """Queries and keys, turned, and the turns after them.

    A token whose turns are not finite does not turn those after it, which may be of another
    document.

    Args:
      rows: queries and keys.
      turns: of each token.
      division: how they lie on a mesh.
      tail: of a stream, the turns before its next tokens and how many of these count; else None.
    """
    turns = jnp.where(jnp.isfinite(turns), turns, 0)
    if division is not None:
        turns = division.lay(turns, "b t h .")
    if tail is None:
        angle, after = angles_of_parts(turns, division), None
    else:
        angle, after = next_angles(turns, *tail)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return tuple(turn_pairs(x, cos.astype(x.dtype), sin.astype(x.dtype)) for x in rows), after


def _phase(turns: Float[Array, "..."]) -> Int[Array, "..."]:
    """Turns less whole ones, in units of 2^-32 turns."""
    part = jnp.round((turns - jnp.round(turns)) / _UNIT)
    return jnp.clip(part, -(2.0**31), 2.0**31 - 128).astype(jnp.int32)  # float32's last below 2^31
