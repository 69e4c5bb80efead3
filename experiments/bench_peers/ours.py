"""Our layers on a CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import memcache_jax as mc
from experiments.bench_peers._jobs import Job, Jobs

Build = Callable[..., Any]


def _case(build: Build) -> Callable[..., Job]:
    """The output and the gradients of a layer's parameters and of its input."""

    def case(length: int, features: int, **sizes: int) -> Job:
        graph, params = nnx.split(build(features, length=length, **sizes))
        x = jax.random.normal(jax.random.key(1), (1, length, features))

        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = nnx.merge(graph, params)(x)
            return jnp.sum(y**2), y

        program = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(params, x).compile()

        def job() -> tuple[int, ...]:
            (_, y), _ = jax.block_until_ready(program(params, x))
            return y.shape

        return job

    return case


def _caching(
    features: int, heads: int, memory: mc.memories.Memory, aggregation: Any, segment: int
) -> mc.nn.MemoryCaching:
    """A layer without a bound on a deep memory's steps, which peers do not have."""
    how: dict[str, Any] = dict(memory=memory, aggregation=aggregation, bounded=False)
    return mc.nn.MemoryCaching(
        features, heads, segmentation=mc.Constant(segment), rngs=nnx.Rngs(0), **how
    )


def _linear(features: int, heads: int, segment: int, **_: int) -> mc.nn.MemoryCaching:
    return _caching(features, heads, mc.memories.LinearAttention(), mc.GRM(), segment)


def _titans(features: int, heads: int, segment: int, chunk: int, **_: int) -> mc.nn.MemoryCaching:
    return _caching(features, heads, mc.memories.Titans(chunk), mc.GRM(), segment)


def _titans_alone(
    features: int, heads: int, length: int, chunk: int, **_: int
) -> mc.nn.MemoryCaching:
    return _caching(features, heads, mc.memories.Titans(chunk), mc.Residual(), length)


def _attention(features: int, heads: int, **_: int) -> mc.nn.Attention:
    return mc.nn.Attention(features, heads, rngs=nnx.Rngs(0))


_JOBS = Jobs(
    {
        "linear GRM": _case(_linear),
        "Titans GRM": _case(_titans),
        "Titans": _case(_titans_alone),
        "attention": _case(_attention),
    }
)
prepare, seconds = _JOBS.prepare, _JOBS.seconds


def error(path: str, segment: int) -> float:
    """How far linear GRM is from a peer's output for the peer's own q, k, v, u.

    Args:
      path: the file of the peer's arrays.
      segment: tokens of a segment.
    """
    with np.load(path) as found:
        *operands, wanted = (jnp.asarray(found[name]) for name in "qkvuy")
    y = mc.memory_caching(
        *operands,
        memory=mc.memories.LinearAttention(),
        aggregation=mc.GRM(pooling="sum"),
        segmentation=mc.Constant(segment),
    )
    if y.shape != wanted.shape:
        raise ValueError(f"the peer returns {wanted.shape}, and ours {y.shape}")
    return float(jnp.max(jnp.abs(y - wanted)) / jnp.max(jnp.abs(wanted)))
