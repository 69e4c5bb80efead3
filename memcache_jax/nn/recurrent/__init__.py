"""Memory-caching layers composed of parts: paths, coefficients of the rule, an output."""

from memcache_jax.nn.recurrent.coefficients import (
    Coefficient,
    LowRankDecay,
    Rate,
    TimeStep,
    TimeStepDecay,
)
from memcache_jax.nn.recurrent.layer import Recurrent, RecurrentMixer
from memcache_jax.nn.recurrent.output import Output
from memcache_jax.nn.recurrent.path import Path

__all__ = [
    "Coefficient",
    "LowRankDecay",
    "Output",
    "Path",
    "Rate",
    "Recurrent",
    "RecurrentMixer",
    "TimeStep",
    "TimeStepDecay",
]
