"""Low-rank adapters of a model's projections (LoRA, arXiv:2106.09685)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax._checks import check_fields
from memcache_jax._typing import Array, Float
from memcache_jax.nn.layers import Linear


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Each projection of a model's blocks W x becomes W x + (alpha / rank) B A x.

    A is random (He uniform) and B zero at first, so that a new model computes what it did. The
    embedding, the output layer, convolutions, sparse experts and the connectors of gates have none.

    Attributes:
      rank: rows of A.
      alpha: the factor, times the rank.

    Raises:
      ValueError: for a rank below 1, or an alpha that is not a positive number.
    """

    rank: int = 16
    alpha: float = 16.0

    def __post_init__(self) -> None:
        check_fields(self, sizes=("rank",), numbers=("alpha",))
        if self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")

    def attach(self, module: nnx.Module, *, rngs: nnx.Rngs) -> None:
        """Gives the projections within a module their adapters."""
        found = [(path, part) for path, part in nnx.iter_modules(module) if type(part) is Linear]
        for path, linear in found:
            if path[-1] != "connector":
                linear.low_rank = Adapter(self, linear, rngs=rngs)


class Adapter(nnx.Module):
    """The adapter of a projection: x -> (alpha / rank) B A x."""

    def __init__(self, lora: LoRA, of: Linear, *, rngs: nnx.Rngs) -> None:
        self.scale = lora.alpha / lora.rank
        # In bfloat16 small steps would round to none.
        param_dtype = jnp.promote_types(of.param_dtype, jnp.float32)
        options: dict[str, Any] = dict(dtype=of.dtype, param_dtype=param_dtype, rngs=rngs)
        first, last = of.axes
        init = jax.nn.initializers.he_uniform()
        zeros = jax.nn.initializers.zeros
        self.down = Linear(
            of.in_features, lora.rank, axes=(first, None), kernel_init=init, **options
        )
        self.up = Linear(
            lora.rank, of.out_features, axes=(None, last), kernel_init=zeros, **options
        )

    def __call__(self, inputs: Float[Array, "... d"], out_sharding: Any = None) -> Array:
        """Returns what is added to the projection."""
        return self.scale * self.up(self.down(inputs), out_sharding)

    def matrix(self) -> Float[Array, "... d e"]:
        """Returns what would be added to the projection's kernel, for all stacked layers."""
        return _matrix(self.down.kernel[...], self.up.kernel[...], self.scale)

    def merged(self, kernel: Float[Array, "... d e"]) -> Float[Array, "... d e"]:
        """Returns the projection's kernel with that added, in the wider of both dtypes."""
        return _merged(kernel, self.down.kernel[...], self.up.kernel[...], self.scale)


def _matrix(down: Array, up: Array, scale: float) -> Array:
    wide = jnp.promote_types(jnp.result_type(down, up), jnp.float32)
    return scale * jnp.matmul(down.astype(wide), up.astype(wide), precision="highest")


@functools.partial(jax.jit, static_argnames="scale")
def _merged(kernel: Array, down: Array, up: Array, scale: float) -> Array:
    return kernel + _matrix(down, up, scale)
