"""Our delta rules and those of peers, compiled for TPUs that this machine lacks."""

import functools
import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from experiments._compilers import TPUS, described_tpu, placed

Operands = Mapping[str, Any]


@functools.cache
def compiled(case: str, chip: str, gradient: bool, **sizes: int) -> dict[str, float]:
    """Returns the bytes, the temporaries, the seconds and the loops of a program for a TPU.

    Args:
      case: one of ``CASES``.
      chip: the kind of TPU; the same one in all calls of a process.
      gradient: whether to compile the gradient of all arrays, or the output alone.
      **sizes: ``length``, ``heads`` and ``dim``.
    """
    device = described_tpu(chip)
    given = shapes(case, **sizes)
    arrays = placed(jax.eval_shape(_heads_first, given) if case in HEADS_FIRST else given, device)
    # Peers look for the platform of this process, not of the program.
    with jax.default_device(device), mock.patch("jax.default_backend", return_value="tpu"):
        lowered = jax.jit(_gradient(CASES[case]) if gradient else CASES[case]).lower(arrays)
    if "tpu_custom_call" not in lowered.as_text():
        raise NotImplementedError(f"{case} compiles without a kernel for {TPUS[chip]}")
    begin = time.process_time()
    program = lowered.compile()
    seconds = time.process_time() - begin
    cost, memory = program.cost_analysis(), program.memory_analysis()
    assert cost is not None
    assert memory is not None
    loops = lowered.as_text().count("stablehlo.while")
    found = dict(bytes=cost["bytes accessed"], temporaries=memory.temp_size_in_bytes)
    return found | dict(seconds=seconds, loops=loops)


def error(case: str, **sizes: int) -> float:
    """How far a peer's output is from our reference's on this machine, relative to the largest."""
    with jax.default_matmul_precision("highest"):
        arrays = operands(case, **sizes)
        wanted = jax.jit(functools.partial(ours, implementation="reference"))(arrays)
        found = jax.jit(PLAIN[case])(arrays)
    if found.shape != wanted.shape:
        raise ValueError(f"{case} returns {found.shape}, and ours {wanted.shape}")
    return float(jnp.max(jnp.abs(found - wanted)) / jnp.max(jnp.abs(wanted)))


def shapes(case: str, length: int, heads: int, dim: int, dtype: Any = jnp.bfloat16) -> Operands:
    """Returns the shapes of queries, keys, values, log decays and betas of one sequence."""
    row = jax.ShapeDtypeStruct((1, length, heads, dim), dtype)
    scalars = jax.ShapeDtypeStruct((1, length, heads), jnp.float32)
    channels = jax.ShapeDtypeStruct(row.shape, jnp.float32)
    decay = channels if "KDA" in case else scalars
    return dict(query=row, key=row, value=row, log_alpha=decay, beta=scalars)


def operands(case: str, **sizes: int) -> Operands:
    """Returns random arrays in float32, with keys of norm one."""
    every = shapes(case, **sizes, dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(every))
    found = {
        name: jax.random.normal(key, every[name].shape)
        for name, key in zip(every, keys, strict=True)
    }
    found["key"] /= jnp.linalg.norm(found["key"], axis=-1, keepdims=True)
    found["log_alpha"] = -0.1 * jax.nn.sigmoid(found["log_alpha"])
    return found | dict(beta=jax.nn.sigmoid(found["beta"]))


def _gradient(function: Callable[[Operands], jax.Array]) -> Callable[[Operands], Operands]:
    return jax.grad(lambda arrays: jnp.sum(function(arrays).astype(jnp.float32) ** 2))


def ours(arrays: Operands, implementation: Any = "pallas_tpu") -> jax.Array:
    """One segment of a memory, without caches, which peers lack."""
    import memcache_jax as mc

    arrays = dict(arrays)
    query, key, value = (arrays.pop(name) for name in ("query", "key", "value"))
    channels = arrays["log_alpha"].ndim == 4
    return mc.memory_caching(
        *(query, key, value),
        memory=mc.memories.KDA() if channels else mc.memories.GatedDeltaNet(),
        controls=arrays,
        aggregation=mc.Residual(),
        segmentation=mc.Constant(query.shape[1]),
        implementation=implementation,
    )


def _heads_first(arrays: Operands) -> Operands:
    return {name: jnp.moveaxis(x, 2, 0) for name, x in arrays.items()}


def _tokamax(arrays: Operands, implementation: Any = "mosaic") -> jax.Array:
    """Of arrays with heads first."""
    attend = importlib.import_module("tokamax._src.ops.kda.api").kimi_delta_attention
    rest = dict(arrays)
    gate = rest.pop("log_alpha")
    y, _ = attend(**rest, gate=gate, scale=1.0, implementation=implementation)
    return y


def _tokamax_plain(arrays: Operands) -> jax.Array:
    return jnp.moveaxis(_tokamax(_heads_first(arrays), implementation="xla"), 0, 2)


def _deltanet_tpu(arrays: Operands, **options: Any) -> jax.Array:
    package = importlib.import_module("deltanet_tpu")
    rule = package.chunk_kda if arrays["log_alpha"].ndim == 4 else package.chunk_gdn
    names = ("query", "key", "value", "log_alpha", "beta")
    return rule(*(arrays[name] for name in names), scale=1.0, **options)


CASES: dict[str, Callable[[Operands], jax.Array]] = {
    "GatedDeltaNet": ours,
    "KDA": ours,
    "deltanet-tpu GatedDeltaNet": _deltanet_tpu,
    "deltanet-tpu KDA": _deltanet_tpu,
    "tokamax KDA": _tokamax,
}
"""Ours, and those of peers."""

HEADS_FIRST = ("tokamax KDA",)
"""Cases whose arrays are compiled as the peer takes them, with heads first."""

_SCAN = functools.partial(_deltanet_tpu, fallback_scan=True, precision="fp32")
PLAIN = {
    "deltanet-tpu GatedDeltaNet": _SCAN,
    "deltanet-tpu KDA": _SCAN,
    "tokamax KDA": _tokamax_plain,
}
"""What peers compute on any machine."""
