"""The deep update as a plain scan, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Float
from memcache_jax.kernels.deep_update.form import DescentChunk, Loss, Parts


def deep_update(
    form: DescentChunk, given: Parts, goes_on: Float[Array, "units chunks"], loss: Loss
) -> Parts:
    """See ``api.deep_update``."""

    def step(before: Parts, xs: tuple) -> tuple[Parts, Parts]:
        form, given, goes_on = xs
        start = jax.tree.map(lambda x, new: jnp.where(goes_on > 0, x, new), before, given)
        return form.end(start, loss), start

    def unit(form: DescentChunk, given: Parts, goes_on: Array) -> Parts:
        first = jax.tree.map(lambda x: x[0], given)
        return lax.scan(step, first, (form, given, goes_on))[1]

    return jax.vmap(unit)(form, given, goes_on)
