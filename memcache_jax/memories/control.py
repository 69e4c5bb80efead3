"""Coefficients of write rules."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array


@dataclasses.dataclass(frozen=True)
class Control:
    """One coefficient of a write rule: its axes, and how a layer makes it from its input.

    A layer computes ``scale * activation(x W + bias)``.

    Attributes:
      axes: its shape in axis letters: ``"b t h"`` for one number per token and head,
        ``"b t h k"`` for one per key channel, ``"b t h v"`` for one per value channel, ``"h"`` for
        a constant of each head.
      activation: from logits to the coefficient; decays travel as logs (<= 0).
      bias: what the logits are before training.
      scale: a constant factor.
      optional: whether a caller may leave it out, which means zero.
      learned: whether layers make it; by default unless it is optional.
      per_head: for the axes ``"h"``, makes a layer's constants from the number of heads.
      forget: the value with which a token makes the memory forget everything before it, as at the
        beginning of a document: -inf for the log of a decay. None if no value does.
      most: the largest value that has a meaning, such as 0 for the log of a decay. NumPy arrays are
        checked; other arrays are not, for the host would have to wait for the device.
    """

    axes: str = "b t h"
    activation: Callable[[Array], Array] = jax.nn.sigmoid
    bias: float = 0.0
    scale: float = 1.0
    optional: bool = False
    learned: bool | None = None
    per_head: Callable[[int], Array] | None = None
    forget: float | None = None
    most: float | None = None

    @property
    def per_channel(self) -> bool:
        """Whether there is one for each channel of a key or a value."""
        return self.axes.endswith(("k", "v"))

    @property
    def is_learned(self) -> bool:
        """Whether layers make it."""
        return not self.optional if self.learned is None else self.learned


NEAR_ONE = Control(activation=jax.nn.log_sigmoid, bias=5.0, forget=-jnp.inf, most=0.0)
"""The log of a decay per token and head that starts near one."""
