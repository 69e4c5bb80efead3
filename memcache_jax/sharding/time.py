"""Causal operations whose parts of a sequence need the last tokens of the part before."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Float
from memcache_jax.sharding.division import Division


def over_time(
    causal: Callable[..., Array],
    args: tuple[Array, ...],
    letters: tuple[str, ...],
    *,
    before: int,
    division: Division | None,
) -> Float[Array, "b t d"]:
    """Returns causal(*args), each part of the sequence on its devices.

    Only the last tokens of a part cross the mesh, to the part after it.

    Args:
      causal: its output at a token depends on that token and at most ``before`` earlier ones, which
        are zero before the first.
      args: arrays, of which the first are the rows (b, t, d).
      letters: their axes, as in ``Division``; channels may be divided as heads are.
      before: how many earlier tokens it depends on.
      division: how the rows lie on a mesh.
    """
    least, length = max(before, 1), args[0].shape[1]
    division = None if division is None else division.even(length, least=least)
    if division is None:
        return causal(*args)
    parts, axis = division.parts, division.time_axis
    hops = [(part, part + 1) for part in range(parts - 1)]

    def part(*args: Array) -> Array:
        def with_tail(x: Array, of: str) -> Array:
            if "t" not in of.split():
                return x
            tail = lax.ppermute(x[:, x.shape[1] - before :], axis, hops)
            return jnp.concatenate([tail, x], axis=1)

        if parts == 1 or not before:
            return causal(*args)
        return causal(*map(with_tail, args, letters))[:, before:]

    return division.run(part, args, letters, letters[0])
