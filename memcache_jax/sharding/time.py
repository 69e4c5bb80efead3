"""What a part of a sequence needs of the part before it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Float
from memcache_jax.sharding.mesh import active_mesh, fit, spec


def over_time(
    causal: Callable[[Array, Array], Array],
    x: Float[Array, "b t d"],
    kernel: Float[Array, "w d"],
    *,
    before: int,
) -> Float[Array, "b t d"]:
    """Returns causal(x, kernel), each part of the sequence on its devices.

    Only the last tokens of a part cross the mesh, to the part after it.

    Args:
      causal: channel by channel, from the tokens and at most ``before`` tokens before each, zero
        before the first.
      x: the tokens.
      kernel: whatever else it takes of each channel.
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
        return causal(x, kernel)
    hops = [(part, part + 1) for part in range(parts - 1)]

    def part(x: Array, kernel: Array) -> Array:
        tail = lax.ppermute(x[:, x.shape[1] - before :], "seq", hops)
        return causal(jnp.concatenate([tail, x], axis=1), kernel)[:, before:]

    rows = fit(spec("batch", "time", "heads"), x, mesh)
    channels = fit(spec(None, "heads"), kernel, mesh)
    return jax.shard_map(part, in_specs=(rows, channels), out_specs=rows, check_vma=False)(
        x, kernel
    )
