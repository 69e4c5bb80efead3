"""The combinations that the shared tests run over: a new rule or variant is listed here once."""

import contextlib
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import memcache_jax as mc

MEMORIES = {
    "linear": mc.memories.LinearAttention(),
    "retnet": mc.memories.RetNet(),
    "ssd": mc.memories.SSD(),
    "swla": mc.memories.SWLA(),
    "gla": mc.memories.GLA(),
    "deltanet": mc.memories.DeltaNet(),
    "gated_deltanet": mc.memories.GatedDeltaNet(),
    "rwkv7": mc.memories.RWKV7(),
    "dla": mc.memories.DLA(chunk_size=4, expansion=2),
    "titans": mc.memories.Titans(chunk_size=4, expansion=2),
    "titans_depth1": mc.memories.Titans(chunk_size=4, depth=1),
    "vector": mc.memories.Vector(),
}
# One of each family, for what the rule has little part in.
FAMILIES = {name: MEMORIES[name] for name in ("linear", "gated_deltanet", "titans")}
AGGREGATIONS = {
    "residual": mc.Residual(),
    "grm": mc.GRM(),
    "soup": mc.Soup(),
    "ssc": mc.SSC(top_k=2),
}
SEGMENTATIONS = {"constant": mc.Constant, "logarithmic": mc.Logarithmic}
SCHEDULES = ("in_turn", "side_by_side")
STARTS = ("independent", "checkpoint")


def unit(x):
    """Rows of norm one."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def make_inputs(memory, length, *, batch=2, heads=3, dim=4, seed=0, dtype=None):
    """Random arguments of ``memory_caching`` for a memory, as one dict."""
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    rows = (batch, length, heads, dim)
    sizes = dict(b=batch, t=length, h=heads, k=dim, v=dim)

    def normal(shape):
        return jax.random.normal(next(keys), shape, dtype)

    inputs: dict[str, Any] = dict(
        query=unit(normal(rows)), key=unit(normal(rows)), value=normal(rows)
    )
    inputs["connector"] = 3 * unit(normal(rows))
    inputs["controls"] = {}
    for name, control in memory.controls.items():
        if control.per_head is not None:
            inputs["controls"][name] = control.per_head(heads).astype(rows_dtype(dtype))
            continue
        logits = normal(tuple(sizes[axis] for axis in control.axes.split()))
        inputs["controls"][name] = control.scale * control.activation(logits)
    inputs["weights"] = {
        name: normal((heads, *shape)) / jnp.sqrt(1.0 * shape[1]).astype(rows_dtype(dtype))
        for name, shape in memory.weight_shapes(dim, dim).items()
    }
    return inputs


def rows_dtype(dtype):
    """The dtype that None stands for."""
    return dtype or jnp.zeros(()).dtype


@functools.partial(jax.jit, static_argnums=(1, 2), static_argnames=("size", "start", "schedule"))
def run(inputs, memory, aggregation, *, size=8, start: Any = "independent", schedule="in_turn"):
    """``memory_caching`` on the inputs of ``make_inputs``, by the fast path."""
    with scheduled(schedule):
        return mc.memory_caching(
            **inputs,
            memory=memory,
            aggregation=aggregation,
            segmentation=mc.Constant(size),
            start=start,
        )


@functools.partial(jax.jit, static_argnums=(1, 2), static_argnames=("size", "start"))
def run_reference(inputs, memory, aggregation, *, size=8, start: Any = "independent"):
    """The same, token by token."""
    return mc.memory_caching(
        **inputs,
        memory=memory,
        aggregation=aggregation,
        segmentation=mc.Constant(size),
        start=start,
        implementation="reference",
    )


@functools.partial(
    jax.jit,
    static_argnames=("memory", "size", "aggregations", "segmentations", "starts", "options"),
)
def run_all(
    inputs,
    memory,
    *,
    size=4,
    aggregations=tuple(AGGREGATIONS),
    segmentations=tuple(SEGMENTATIONS),
    starts=STARTS,
    options=(),
):
    """Every aggregation, segmentation and start in one program, by name."""
    return {
        f"{aggregation}/{segmentation}/{start}": mc.memory_caching(
            **inputs,
            memory=memory,
            aggregation=AGGREGATIONS[aggregation],
            segmentation=SEGMENTATIONS[segmentation](size),
            start=start,
            **dict(options),
        )
        for aggregation in aggregations
        for segmentation in segmentations
        for start in starts
    }


REFERENCE = (("implementation", "reference"),)


@contextlib.contextmanager
def scheduled(schedule):
    """Units run in turn, as a CPU does, or side by side, as accelerators do."""
    if schedule == "in_turn":
        yield
        return
    with mock.patch(
        "memcache_jax.kernels._units.lax.platform_dependent",
        lambda *args, cpu, default: default(*args),
    ):
        yield


def assert_close(got, wanted, tolerance, scale=None):
    """Asserts that all leaves agree to ``tolerance`` relative to each wanted leaf's largest."""

    def check(path, g, w):
        reference = scale or jnp.maximum(jnp.max(jnp.abs(w)), 1e-30) if w.size else 1.0
        error = jnp.max(jnp.abs(g - w)) / reference if w.size else 0.0
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error} > {tolerance}"

    jax.tree_util.tree_map_with_path(check, got, wanted)
