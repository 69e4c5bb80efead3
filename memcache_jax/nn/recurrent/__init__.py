"""Memory-caching layers composed of parts, and those of papers so composed."""

from memcache_jax.nn.recurrent.coefficients import (
    Coefficient,
    LowRankDecay,
    Rate,
    TimeStep,
    TimeStepDecay,
)
from memcache_jax.nn.recurrent.decays import FixedDecay, ForgetGate
from memcache_jax.nn.recurrent.declared import Declared
from memcache_jax.nn.recurrent.in_context import InContextRate, LimitedDecay
from memcache_jax.nn.recurrent.layer import Recurrent, RecurrentMixer
from memcache_jax.nn.recurrent.low_rank import LowRank
from memcache_jax.nn.recurrent.output import Output
from memcache_jax.nn.recurrent.path import Path
from memcache_jax.nn.recurrent.published import (
    hgrn2,
    lightning_attention,
    mamba3,
    titans_block,
)
from memcache_jax.nn.recurrent.trapezoid import Trapezoid
from memcache_jax.nn.token_shift import LayerInput

__all__ = [
    "Coefficient",
    "Declared",
    "FixedDecay",
    "ForgetGate",
    "InContextRate",
    "LayerInput",
    "LimitedDecay",
    "LowRank",
    "LowRankDecay",
    "Output",
    "Path",
    "Rate",
    "Recurrent",
    "RecurrentMixer",
    "TimeStep",
    "TimeStepDecay",
    "Trapezoid",
    "hgrn2",
    "lightning_attention",
    "mamba3",
    "titans_block",
]
