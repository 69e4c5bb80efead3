"""Our delta rules on a GPU."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench_peers import tpu
from experiments.bench_peers._jobs import Job, Jobs


def _case(name: str, implementation: str) -> Callable[..., Job]:
    """The output and the gradients of all arrays, in bfloat16, decays and betas in float32."""

    def case(**sizes: int) -> Job:
        if jax.default_backend() != "gpu":
            raise ImportError("JAX sees no GPU here: pip install 'jax[cuda13]'")
        of = tpu.shapes(name, **sizes)
        arrays = {key: x.astype(of[key].dtype) for key, x in tpu.operands(name, **sizes).items()}
        rule = functools.partial(tpu.ours, implementation=implementation)

        def loss(arrays: Any) -> tuple[jax.Array, jax.Array]:
            y = rule(arrays)
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(arrays).compile()

        def job() -> tuple[int, ...]:
            (_, y), _ = jax.block_until_ready(program(arrays))
            return y.shape

        return job

    return case


_JOBS = Jobs(
    {
        f"{rule}, {implementation}": _case(rule, implementation)
        for rule in ("GatedDeltaNet", "KDA")
        for implementation in ("xla", "pallas_gpu")
    },
    time.perf_counter,
)
prepare, seconds = _JOBS.prepare, _JOBS.seconds


def error(path: str) -> float:
    """How far our reference is from a peer's output for the peer's arrays."""
    with np.load(path) as found:
        arrays: dict[str, Any] = {name: jnp.asarray(x) for name, x in found.items()}
    wanted = arrays.pop("y")
    with jax.default_matmul_precision("highest"):
        y = tpu.ours(arrays, implementation="reference")
    if y.shape != wanted.shape:
        raise ValueError(f"the peer returns {wanted.shape}, and ours {y.shape}")
    return float(jnp.max(jnp.abs(y - wanted)) / jnp.max(jnp.abs(wanted)))
