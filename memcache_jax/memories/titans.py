"""Titans: a deep memory with momentum and weight decay."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Controls, Float
from memcache_jax.memories.control import NEAR_ONE, Control
from memcache_jax.memories.deep import DeepMemory


@dataclasses.dataclass(frozen=True)
class Titans(DeepMemory):
    """Titans' long-term memory: descent on the recall error, with momentum and weight decay.

    Eq. 34-36 of arXiv:2602.24281, with l_t(M) = ||M(k_t) - v_t||^2::

        S_t = beta_t S_{t-1} - eta_t grad l_t
        M_t = alpha_t M_{t-1} + S_t

    The paper prints ``M_t = alpha_t M_{t-1} - S_t``, which climbs the loss; the sign here is that
    of the Titans paper (arXiv:2501.00663). The gradient is taken at the state with which the
    token's chunk began; ``chunk_size=1`` is the exact online rule.

    Controls, each (b, t, h): ``log_alpha`` and ``log_beta`` (<= 0), ``eta`` (>= 0).

    Attributes:
      chunk_size: tokens that share the point at which gradients are taken.
      expansion: hidden width over key dimension.
      depth: 2 for M(x) = x + W1 gelu(W2 x), 1 for M(x) = W x.
      max_step_norm: the longest momentum, as in ``DeepMemory``.
      ns_steps: Newton-Schulz iterations of the Muon step that ends each chunk, 0 for none, as in
        ``DeepMemory``.
      degree: 1, or 2 for polynomial features of keys and queries, as in ``DeepMemory``.

    Raises:
      ValueError: for a depth or degree other than 1 or 2, sizes below 1, or negative ``ns_steps``.

    Example:
      >>> import memcache_jax as mc
      >>> mc.memories.Titans(chunk_size=32).weight_shapes(64, 64)
      {'W2': (256, 64), 'W1': (64, 256)}
    """

    zeros_add_nothing: ClassVar[bool] = True

    @property
    def controls(self) -> Mapping[str, Control]:
        """log_alpha (weight decay, near 0), log_beta (momentum), eta (step size)."""
        return {
            "log_alpha": NEAR_ONE,
            "log_beta": Control(activation=jax.nn.log_sigmoid, bias=0.0, most=0.0),
            "eta": Control(activation=jax.nn.softplus, bias=-2.0, scale=1.0 / self.chunk_size),
        }

    def coupled(self, controls: Controls) -> Controls:
        """Scales eta by 1 - beta.

        A chunk's gradients are summed at one point and momentum carries them on, so that a chunk of
        equal keys moves the memory by eta chunk_size / (1 - beta) gradients. With features of
        squared norm s that is stable while 2 s eta chunk_size / (1 - beta) < 2; whatever beta is
        learned, it begins near 0.2 s.
        """
        kept = 1 - jnp.exp(controls["log_beta"])
        return {**controls, "eta": controls["eta"] * kept}

    def loss(self, prediction: Float[Array, "rows v"], value: Float[Array, "rows v"]) -> Array:
        """The squared error of recall."""
        return jnp.sum((prediction - value) ** 2)
