"""Causal operations whose parts of a sequence need the last tokens of the part before."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Float, Int
from memcache_jax.sharding.mesh import active_mesh, fit, spec


def over_time(
    causal: Callable[..., Array],
    x: Float[Array, "b t d"],
    kernel: Float[Array, "w d"],
    *rows: Int[Array, "b t"],
    before: int,
) -> Float[Array, "b t d"]:
    """Returns causal(x, kernel, *rows), each part of the sequence on its devices.

    Only the last tokens of a part cross the mesh, to the part after it. ``causal`` acts on each
    channel alone; its output at a token depends on that token and at most ``before`` earlier ones,
    which are zero before the first.
    """
    mesh = active_mesh()
    parts, length = 1 if mesh is None else mesh.shape["seq"], x.shape[1]
    # The compiler divides parts of unequal sizes, or shorter than ``before``.
    if mesh is None or not before or parts == 1 or length % parts or length // parts < before:
        return causal(x, kernel, *rows)
    hops = [(part, part + 1) for part in range(parts - 1)]

    def part(x: Array, kernel: Array, *rows: Array) -> Array:
        def with_tail(x: Array) -> Array:
            tail = lax.ppermute(x[:, x.shape[1] - before :], "seq", hops)
            return jnp.concatenate([tail, x], axis=1)

        return causal(with_tail(x), kernel, *map(with_tail, rows))[:, before:]

    tokens = fit(spec("batch", "time", "heads"), x, mesh)
    channels = fit(spec(None, "heads"), kernel, mesh)
    return jax.shard_map(
        part,
        in_specs=(tokens, channels, *(fit(spec("batch", "time"), row, mesh) for row in rows)),
        out_specs=tokens,
        check_vma=False,
    )(x, kernel, *rows)
