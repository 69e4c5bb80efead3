"""Coefficients as a write rule declares them."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array
from memcache_jax.memories import Control, Memory
from memcache_jax.nn.layers import SMALL, Linear
from memcache_jax.nn.recurrent.coefficients import Heads, Tokens
from memcache_jax.nn.recurrent.low_rank import wide
from memcache_jax.nn.token_shift import LayerInput


@dataclasses.dataclass(frozen=True)
class Declared:
    """All coefficients of a rule as its ``controls`` say: scale * activation(x W + bias).

    As ``mc.nn.MemoryCaching`` makes them: for any rule, of one's own too. A coefficient per value
    channel needs values of the keys' dimension.

    Attributes:
      memory: the rule, that of the layer.
    """

    memory: Memory

    def __post_init__(self) -> None:
        wanted = "a write rule such as mc.memories.GatedDeltaNet()"
        _checks.check_instance("memory", self.memory, Memory, wanted)

    @property
    def learned(self) -> dict[str, Control]:
        """The controls that are made of the input."""
        controls = self.memory.controls.items()
        return {name: c for name, c in controls if c.is_learned and c.per_head is None}

    @property
    def names(self) -> tuple[str, ...]:
        """Those of these controls."""
        return tuple(self.learned)

    def build(self, in_features: int, heads: int, dim: int, **options: Any) -> "DeclaredOf":
        """Returns the module."""
        return DeclaredOf(self, in_features, heads, dim, **options)


class DeclaredOf(nnx.Module):
    """The module of a ``Declared``."""

    def __init__(
        self, declared: Declared, in_features: int, heads: int, dim: int, **options: Any
    ) -> None:
        self.declared = declared
        self.controls = nnx.Dict()
        for name, control in declared.learned.items():
            self.controls[name] = Linear(
                in_features,
                heads * (dim if control.per_channel else 1),
                axes=("embed", "heads"),
                use_bias=True,
                kernel_init=SMALL,
                bias_init=jax.nn.initializers.constant(control.bias),
                **options,
            )

    def __call__(self, inputs: LayerInput, heads: Heads, tokens: Tokens) -> dict[str, Array]:
        """Returns the coefficients."""
        made = {}
        for name, control in self.declared.learned.items():
            logits = wide(self.controls[name](inputs.x))
            logits = heads(logits) if control.per_channel else logits
            made[name] = control.scale * control.activation(logits)
        return dict(self.declared.memory.coupled(made))
