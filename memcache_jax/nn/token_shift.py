"""Token shift: a layer's input with a share of the token before it (arXiv:2305.13048)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax._typing import Array, Float, Int
from memcache_jax.kernels.short_conv import shift, shift_in_documents
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.names import partitioned
from memcache_jax.sharding.time import over_time


class LayerInput(NamedTuple):
    """A layer's input.

    Attributes:
      x: the input.
      previous: the token before each, where some part mixes in a share of it.
    """

    x: Float[Array, "b t d"]
    previous: Float[Array, "b t d"] | None = None

    def mixed(self, module: Any) -> Float[Array, "b t d"]:
        """x_t + mix (x_{t-1} - x_t), with the module's ``mix``; x_t if it has none."""
        if self.previous is None or not hasattr(module, "mix"):
            return self.x
        mix = module.mix[...].astype(self.x.dtype)[None, None]
        return self.x + mix * (self.previous - self.x)


def make_mix(features: int, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Param:
    """How much of the token before goes into each channel, half at first."""
    init = partitioned(jax.nn.initializers.constant(0.5), None)
    return nnx.Param(init(rngs.params(), (features,), param_dtype))


def previous_tokens(
    x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None
) -> Float[Array, "b t d"]:
    """The token before each, zero before the first of a sequence or of a document."""
    division = Division.of((x, "b t ."), (document_ids, "b t"))
    if document_ids is None:
        return over_time(shift, (x,), ("b t .",), before=1, division=division)
    letters = "b t .", "b t"
    return over_time(shift_in_documents, (x, document_ids), letters, before=1, division=division)


def next_previous(
    x: Float[Array, "b t d"], tail: Float[Array, "b 1 d"], lengths: Int[Array, "b"]
) -> tuple[Float[Array, "b t d"], Float[Array, "b 1 d"]]:
    """The same for a stream's next tokens, of which ``lengths`` count, and each row's last one."""

    def both(x: Array, tail: Array, lengths: Array) -> tuple[Array, Array]:
        rows = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
        last = jax.vmap(lambda row, begin: jax.lax.dynamic_slice_in_dim(row, begin, 1))
        return rows[:, :-1], last(rows, lengths).astype(tail.dtype)

    division = Division.of((x, "b . ."), (tail, "b . ."))
    if division is None:
        return both(x, tail, lengths)
    row = "b . ."
    return division.run(both, (x, tail, lengths), (row, row, "b"), (row, row))
