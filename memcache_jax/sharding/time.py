"""What a part of a sequence needs of the part before it."""

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

    Only the last tokens of a part cross the mesh, to the part after it.

    Args:
      causal: channel by channel, from the tokens and at most ``before`` tokens before each, zero
        before the first.
      x: the tokens.
      kernel: whatever else it takes of each channel.
      rows: and of each token.
      before: how far it looks back.
    """
    mesh = active_mesh()
    parts = 1 if mesh is None else mesh.shape["seq"]
    # Parts that are not of one size, or shorter than that, are left to the compiler.
    if (
        mesh is None
        or not before
        or parts == 1
        or x.shape[1] % parts
        or x.shape[1] // parts < before
    ):
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
