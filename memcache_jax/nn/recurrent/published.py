"""Layers of papers as compositions of parts, each with every aggregation and segmentation.

Each function returns a ``RecurrentMixer`` from sizes. Other keywords are the mixer's:
``aggregation``, ``segmentation``, ``start``, ``implementation`` and ``exchange``.
"""

from typing import Any

from memcache_jax import _checks
from memcache_jax.memories import GLA, SWLA, Memory, RetNet
from memcache_jax.nn.recurrent.decays import FixedDecay, ForgetGate
from memcache_jax.nn.recurrent.declared import Declared
from memcache_jax.nn.recurrent.layer import RecurrentMixer
from memcache_jax.nn.recurrent.output import Output
from memcache_jax.nn.recurrent.path import Path
from memcache_jax.nn.recurrent.trapezoid import Trapezoid


def lightning_attention(
    heads: int, head_dim: int, *, decay_scale: float = 1.0, **caches: Any
) -> RecurrentMixer:
    """Lightning Attention (arXiv:2401.04658) as MiniMax-01 has it (arXiv:2501.08313).

    M_t = gamma_h M_{t-1} + v_t k_t^T with gamma_h = exp(-decay_scale 2^(-8 (h + 1) / heads)); SiLU
    on q, k and v; y = W_o (norm(M_t q_t) * sigmoid(x W_g)), an RMSNorm over all heads together.

    Args:
      heads: number of heads.
      head_dim: dimension of keys and values of a head.
      decay_scale: a factor of the rates, which in MiniMax-01 is 1 - layer / (layers - 1) + 1e-5.
      caches: fields of ``RecurrentMixer``.

    Raises:
      ValueError: for sizes that are not positive integers, or a negative ``decay_scale``.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> mixer = mc.nn.recurrent.lightning_attention(
      ...     2, 8, aggregation=mc.GRM(), segmentation=mc.Constant(4))
      >>> mixer.build(16, rngs=nnx.Rngs(0))(jnp.ones((1, 10, 16))).shape
      (1, 10, 16)
    """
    heads = _checks.check_integer("heads", heads)
    scale = _checks.check_number("decay_scale", decay_scale, ">= 0", lambda x: x >= 0)
    rates = tuple(scale * 2.0 ** (-8 * (head + 1) / heads) for head in range(heads))
    path = Path(heads, head_dim, activation="silu")
    output = Output(1, shared_scale=False, gate="sigmoid")
    return RecurrentMixer(RetNet(), path, path, path, (FixedDecay(rates),), output, **caches)


def hgrn2(heads: int, head_dim: int, *, least: float = 0.0, **caches: Any) -> RecurrentMixer:
    """HGRN2, a gated linear RNN with an expanded state (arXiv:2404.07904).

    M_t = M_{t-1} diag(f_t) + v_t (1 - f_t)^T with f_t = least + (1 - least) sigmoid(x W_f), the
    rule of ``GLA``; y = W_o norm(M_t silu(x W_q)), an RMSNorm over all heads together. The paper
    learns the lower bound of f for each layer, where here it is given.

    Args:
      heads: number of heads.
      head_dim: dimension of forget gates and values of a head, the expansion of the state.
      least: the lower bound of f, in [0, 1), which the paper lets grow with depth.
      caches: fields of ``RecurrentMixer``.

    Raises:
      ValueError: for sizes that are not positive integers, or another ``least``.

    Example:
      >>> import memcache_jax as mc
      >>> mc.nn.recurrent.hgrn2(2, 8, least=0.5).coefficients
      (ForgetGate(least=0.5),)
    """
    path = Path(heads, head_dim)
    query = Path(heads, head_dim, activation="silu")
    output = Output(1, shared_scale=False, gate=None)
    return RecurrentMixer(GLA(), query, path, path, (ForgetGate(least),), output, **caches)


def mamba3(
    heads: int,
    head_dim: int,
    *,
    state_dim: int = 128,
    groups: int = 1,
    rope_base: float | None = None,
    **caches: Any,
) -> RecurrentMixer:
    """A layer with the trapezoidal rule of Mamba-3 (arXiv:2603.15569).

    M_t = alpha_t M_{t-1} + beta_t v_{t-1} k_{t-1}^T + lam_t v_t k_t^T, with the coefficients of
    ``Trapezoid``, the rule of ``SWLA``; y = W_o ((M_t q_t + D v_t) * silu(x W_z)).

    The same as in the paper's layer: the coefficients from a step, a share and a rate
    A = -max(softplus(x W_A), 1e-4), all three by the data; keys and queries (B and C) that have an
    RMSNorm and are shared by the heads of a group, then a bias of each head and channel, and then
    turn by angles that follow the data, pi tanh(x W) dt at each token; D, the gate, and no
    convolution. Not the same: one input and one output per state (SISO), and all pairs of channels
    turn. With a ``rope_base`` keys and queries turn with the position instead, and have no biases.

    Args:
      heads: number of heads.
      head_dim: dimension of values of a head.
      state_dim: dimension of keys, even.
      groups: heads of keys and queries, which divide ``heads``.
      rope_base: wavelength base of rotary positions; None for angles that follow the data.
      caches: fields of ``RecurrentMixer``.

    Raises:
      ValueError: for sizes that are not positive integers or do not fit.

    Example:
      >>> import memcache_jax as mc
      >>> mc.nn.recurrent.mamba3(4, 8, state_dim=16).coefficients
      (Trapezoid(rates=True, turns=True),)
    """
    state_dim = _checks.check_integer("state_dim", state_dim)
    path, value = Path(groups, state_dim, norm="rms", rope_base=rope_base), Path(heads, head_dim)
    by_data, output = rope_base is None, Output(None)
    step = Trapezoid(rates=True, turns=by_data)
    return RecurrentMixer(
        SWLA(), path, path, value, (step,), output, skip=True, biases=by_data, **caches
    )


def titans_block(
    memory: Memory, heads: int, head_dim: int, *, conv_width: int = 4, **caches: Any
) -> RecurrentMixer:
    """The block of Titans and of App. B of arXiv:2602.24281, as ``mc.nn.MemoryCaching`` has it.

    For rules without initial weights. With the same parameters the layers agree, and they start
    alike; but here ``Residual`` is the default aggregation and no segments the default
    segmentation, and there are no position gates and no ``connector="query"``.

    Args:
      memory: the write rule.
      heads: number of heads.
      head_dim: dimension of keys and values of a head.
      conv_width: taps of the convolutions.
      caches: fields of ``RecurrentMixer``.

    Raises:
      ValueError: for sizes that are not positive integers, or a rule with initial weights.

    Example:
      >>> import memcache_jax as mc
      >>> mixer = mc.nn.recurrent.titans_block(mc.memories.GatedDeltaNet(), 2, 8)
      >>> mixer.coefficients[0].names
      ('log_alpha', 'beta')
    """
    row = Path(heads, head_dim, conv_width=conv_width, norm="l2")
    value = Path(heads, head_dim, conv_width=conv_width)
    return RecurrentMixer(memory, row, row, value, (Declared(memory),), matched=True, **caches)
