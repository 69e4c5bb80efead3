"""Causal operations whose parts of a sequence need the last tokens of the part before."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Float, Int
from memcache_jax.sharding.division import Division


def over_time(
    causal: Callable[..., Array],
    x: Float[Array, "b t d"],
    kernel: Float[Array, "w d"],
    *rows: Int[Array, "b t"],
    before: int,
    division: Division | None,
) -> Float[Array, "b t d"]:
    """Returns causal(x, kernel, *rows), each part of the sequence on its devices.

    Only the last tokens of a part cross the mesh, to the part after it. ``causal`` acts on each
    channel alone; its output at a token depends on that token and at most ``before`` earlier ones,
    which are zero before the first. Channels are divided as heads are.
    """
    division = None if division is None else division.even(x.shape[1], least=max(before, 1))
    if division is None:
        return causal(x, kernel, *rows)
    parts, axis = division.parts, division.time_axis
    hops = [(part, part + 1) for part in range(parts - 1)]

    def part(x: Array, kernel: Array, *rows: Array) -> Array:
        def with_tail(x: Array) -> Array:
            tail = lax.ppermute(x[:, x.shape[1] - before :], axis, hops)
            return jnp.concatenate([tail, x], axis=1)

        if parts == 1 or not before:
            return causal(x, kernel, *rows)
        return causal(with_tail(x), kernel, *map(with_tail, rows))[:, before:]

    letters = ("b t h", ". h", *["b t" for _ in rows])
    return division.run(part, (x, kernel, *rows), letters, "b t h")
