"""Memory-caching layers composed of parts: paths, coefficients of the rule, an output."""

from memcache_jax.nn.recurrent.coefficients import (
    Coefficient,
    LowRankDecay,
    Rate,
    TimeStep,
    TimeStepDecay,
)
from memcache_jax.nn.recurrent.in_context import InContextRate, LimitedDecay
from memcache_jax.nn.recurrent.layer import Recurrent, RecurrentMixer
from memcache_jax.nn.recurrent.low_rank import LowRank
from memcache_jax.nn.recurrent.output import Output
from memcache_jax.nn.recurrent.path import Path
from memcache_jax.nn.token_shift import LayerInput

__all__ = [
    "Coefficient",
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
]
