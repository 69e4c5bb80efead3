"""The operations with kernels, at the sizes at which programs check, time and compile them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import memcache_jax as mc
from memcache_jax.engine.read import bands_of
from memcache_jax.kernels.bands import sum_of_bands
from memcache_jax.kernels.bank_read import bank_read
from memcache_jax.kernels.grouped_read import grouped_read
from memcache_jax.kernels.ssc_route import ssc_route
from memcache_jax.segmentation import ReadPlan


class Case(NamedTuple):
    """One operation at one size.

    Attributes:
      name: of the operation and its size.
      call: a function of (implementation, *arrays) that returns the differentiable outputs.
      arrays: the differentiated arguments.
      flops: of the forward pass; the backward pass has twice as many.
      bytes: minimum that the forward pass reads and writes.
    """

    name: str
    call: Callable[..., Any]
    arrays: tuple
    flops: float
    bytes: float


def is_chosen(name: str, only: Sequence[str] | None) -> bool:
    """Whether a case runs: all do, or those whose names contain one of ``only``."""
    return only is None or any(part in name for part in only)


def cases(
    size: str, dtype: Any, only: Sequence[str] | None = None, *, abstract: bool = False
) -> list[Case]:
    """Returns the operations at the sizes for correctness (``"small"``) or timing (``"large"``).

    Args:
      size: ``"small"`` or ``"large"``.
      dtype: of all arrays.
      only: parts of names that select cases; None for all.
      abstract: return shapes and dtypes instead of arrays, for compilation.
    """
    small = size == "small"
    rng = np.random.default_rng(0)
    found = []

    def normal(*shape: int, scale: float = 1.0, of: Callable = lambda x: x) -> Any:
        if abstract:
            return jax.ShapeDtypeStruct(shape, dtype)
        return of(jnp.asarray(rng.standard_normal(shape, np.float32) * scale, dtype))

    for k in (32, 64, 96, 128) if small else (64, 128):
        b, h, n, c, s = (1, 2, 5, 80, 2) if small else (2, 8, 64, 256, 4)
        plan = mc.Constant(c).plan(n * c)
        bank = (normal(b, h, n - 1, k, k, scale=k**-0.5),)
        query, gates = normal(b, h, n, c, k), normal(b, h, n, c, n - 1)
        read = mc.memories.LinearAttention().read
        pairs, item = b * h * n * (n - 1) / 2, jnp.dtype(dtype).itemsize
        rows = b * h * n * c
        found.append(
            Case(
                f"bank_read k={k}",
                lambda how, bank, query, gates, read=read, plan=plan: bank_read(
                    read, bank, query, gates, plan.reads, implementation=how
                ),
                (bank, query, gates),
                2 * pairs * c * k * k,
                item * (2 * rows * k + rows * (n - 1) / 2 + b * h * n * k * k),
            )
        )
        titans = mc.memories.Titans(chunk_size=40 if small else 64)
        deep = tuple(
            normal(b, h, n - 1, *shape[::-1], scale=shape[1] ** -0.5)
            for shape in titans.weight_shapes(k, k).values()
        )
        found.append(
            Case(
                f"bank_read Titans k={k}",
                functools.partial(_read_deep, titans, plan),
                (deep, query, gates),
                16 * pairs * c * k * k,
                item * (2 * rows * k + rows * (n - 1) / 2 + 8 * b * h * n * k * k),
            )
        )
        states = jnp.asarray(rng.integers(0, n - 1, (b, h, n, c, s)))
        chosen = normal(b, h, n, c, s)
        found.append(
            Case(
                f"grouped_read k={k} s={s}",
                # A barrier, so that the compiler does not sort constants ahead of time.
                lambda how, bank, query, gates, read=read, states=states: grouped_read(
                    *(read, bank, query, gates, jax.lax.optimization_barrier(states)),
                    implementation=how,
                ),
                (bank, query, chosen),
                2 * rows * s * k * k,
                item * (2 * rows * s * k + b * h * n * k * k),
            )
        )
        pooled, online = normal(b, h, n - 1, k), normal(b, h, n, c)
        found.append(
            Case(
                f"ssc_route u={k} s={s}",
                lambda how, u, pooled, online, plan=plan, s=s: ssc_route(
                    u, pooled, online, plan.reads, s, implementation=how
                )[:2],
                (query, pooled, online),
                2 * pairs * c * k,
                item * rows * (k + 2 * s),
            )
        )
        tokens = [normal(b, n * c, h, k, scale=k**-0.5) for _ in range(4)]
        for memory in (mc.memories.SSD(), mc.memories.GatedDeltaNet(), titans):
            controls = {
                name: normal(b, n * c, h, of=functools.partial(_as_a_layer, control))
                for name, control in memory.controls.items()
            }
            weights = {
                name: normal(h, *shape, scale=shape[1] ** -0.5)
                for name, shape in memory.weight_shapes(k, k).items()
            }
            m = memory.gradient_chunk or memory.largest_chunk
            segment = c if small else n * c
            # A deep memory's products, each of 4 k^2: three forward and back, four that write
            # weights and momentum, four that read both; and two layers' scores and their sums.
            flops = (88 * k + 20 * m) * k if weights else (4 * m + 4 * k) * k
            found.append(
                Case(
                    f"chunk_update {type(memory).__name__} k={k}",
                    lambda how, q, key, v, u, controls, weights, memory=memory, segment=segment: (
                        mc.memory_caching(
                            *(q, key, v, u),
                            controls=controls,
                            weights=weights,
                            memory=memory,
                            aggregation=mc.Residual(),
                            segmentation=mc.Constant(segment),
                            start="checkpoint",
                            implementation=how,
                        )
                    ),
                    (*tokens, controls, weights),
                    rows * flops,
                    item * 4 * rows * k,
                )
            )
    return [case for case in found if is_chosen(case.name, only)]


def _read_deep(
    memory: mc.memories.Memory, plan: ReadPlan, how: str, bank: Any, query: Any, gates: Any
) -> Any:
    """Reads the bank of a deep memory, in bands if a program has no room for all of it."""

    def read_band(read: Callable[..., Any], bank: Any, query: Any) -> Any:
        return bank_read(read, bank, query, gates, plan.reads, implementation=how)

    return sum_of_bands(bands_of(memory), bank, query, how, read_band)


def _as_a_layer(control: mc.memories.Control, x: Any) -> Any:
    """Returns the coefficient that a layer computes from such logits."""
    return (control.scale * control.activation(x + control.bias)).astype(x.dtype)


def passes(case: Case) -> dict[str, Callable]:
    """Returns the forward pass, and forward and backward, as functions of an implementation."""

    def forward(how: str, *arrays: Any) -> Any:
        return case.call(how, *arrays)

    def both(how: str, *arrays: Any) -> Any:
        y, pull = jax.vjp(lambda *arrays: case.call(how, *arrays), *arrays)
        return y, pull(jax.tree.map(jnp.cos, y))

    return {"forward": forward, "backward": both}
