"""Deep linear attention: a deep memory whose loss is linear in what it recalls."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float
from memcache_jax.memories.control import NEAR_ONE, Control
from memcache_jax.memories.deep import DeepMemory


@dataclasses.dataclass(frozen=True)
class DLA(DeepMemory):
    """Deep linear attention: M_t = alpha_t M_{t-1} - eta_t grad l_t, l_t(M) = -<M(k_t), v_t>.

    Eq. 30-33 of arXiv:2602.24281, where alpha = 1. The gradient is taken at the state with which
    the token's chunk began.

    Controls, each (b, t, h): ``eta`` (>= 0), and optionally ``log_alpha`` (<= 0).

    Attributes:
      chunk_size: tokens that share the point at which gradients are taken.
      expansion: hidden width over key dimension.
      depth: 2 for M(x) = x + W1 gelu(W2 x), 1 for M(x) = W x.
      max_step_norm: the longest step of a token, as in ``DeepMemory``.
      ns_steps: Newton-Schulz iterations of the Muon step that ends each chunk, 0 for none, as in
        ``DeepMemory``.
      degree: 1, or 2 for polynomial features of keys and queries, as in ``DeepMemory``.
      decay: whether a layer learns ``log_alpha``; without, nothing is ever forgotten.

    Raises:
      ValueError: for a depth or degree other than 1 or 2, or sizes below 1.

    Example:
      >>> import memcache_jax as mc
      >>> sorted(mc.memories.DLA(chunk_size=32).controls)
      ['eta', 'log_alpha']
    """

    zeros_add_nothing: ClassVar[bool] = True

    decay: bool = True

    @property
    def controls(self) -> Mapping[str, Control]:
        """The step size eta, and the weight decay log_alpha."""
        return {
            "eta": Control(activation=jax.nn.softplus, bias=-2.0, scale=1.0 / self.chunk_size),
            "log_alpha": dataclasses.replace(NEAR_ONE, optional=True, learned=self.decay),
        }

    def loss(self, prediction: Float[Array, "rows v"], value: Float[Array, "rows v"]) -> Array:
        """The negative inner product of prediction and value."""
        return -jnp.sum(prediction * value)
