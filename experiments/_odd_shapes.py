"""Whole calls of odd shapes to compile for TPUs: every rule with every aggregation once.

The text of a compiled program is not read: jaxlib 0.10 cannot read that of programs whose gathers
run on sparse cores, as those of SSC do on v6e ("async-update instruction should have 1 operands").
"""

import dataclasses
import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

import memcache_jax as mc
from experiments._compilers import described_tpu, placed

_SIZES = ((1, 32, 160), (3, 96, 96), (5, 64, 32), (3, 256, 128), (1, 128, 256), (5, 160, 64))
_LENGTHS = ((1280, 128), (1000, 64), (333, 100))


@dataclasses.dataclass(frozen=True)
class OddShape:
    """One call of ``mc.memory_caching``.

    Attributes:
      memory: the write rule.
      aggregation: the aggregation.
      heads: heads h.
      keys: their key dimension k.
      values: their value dimension v.
      length: tokens T.
      segment: segment size C.
      dtype: of all arrays.
    """

    memory: mc.memories.Memory
    aggregation: Any
    heads: int
    keys: int
    values: int
    length: int
    segment: int
    dtype: str

    @property
    def name(self) -> str:
        """What the shape is called."""
        rule, aggregation = type(self.memory).__name__, type(self.aggregation).__name__
        sizes = f"h={self.heads} k={self.keys} v={self.values} T={self.length} C={self.segment}"
        return f"{rule} {aggregation} {sizes} {self.dtype}"


def odd_shapes() -> list[OddShape]:
    """Returns the calls, in an order that is always the same."""
    rules = mc.memories
    deep = (rules.DLA(64), rules.Titans(64))
    memories = (
        *(rules.LinearAttention(), rules.RetNet(), rules.SSD(), rules.SWLA(), rules.GLA()),
        *(rules.DeltaNet(), rules.GatedDeltaNet(), rules.RWKV7(), rules.KDA(), rules.GDN2()),
        *deep,
    )
    aggregations = (mc.Residual(), mc.GRM(), mc.Soup(), mc.SSC(top_k=3))
    found = [OddShape(rules.GatedDeltaNet(), aggregations[3], 3, 96, 96, 1280, 128, "bfloat16")]
    for i, (memory, aggregation) in enumerate(itertools.product(memories, aggregations)):
        # Six and three sizes, four aggregations: each rule has several of all.
        heads, keys, values = _SIZES[(i + i // 4) % len(_SIZES)]
        length, segment = _LENGTHS[(i + i // 3) % len(_LENGTHS)]
        if memory in deep:
            values = keys
            memory = dataclasses.replace(memory, chunk_size=math.gcd(64, segment))
        dtype = ("bfloat16", "float32")[i % 2]
        found.append(OddShape(memory, aggregation, heads, keys, values, length, segment, dtype))
    return found


def compile_shape(chip: str, shape: OddShape) -> str:
    """Compiles a call and its gradient by TPU kernels; returns the seconds, or why it failed.

    Args:
      chip: one of ``_compilers.TPUS``; the same one in all calls of a process.
      shape: the call.

    Raises:
      NoCompilerError: if libtpu is not installed.
    """
    device, memory = described_tpu(chip), shape.memory
    sizes = dict(b=1, t=shape.length, h=shape.heads, k=shape.keys, v=shape.values)

    def array(axes: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct([sizes[axis] for axis in axes.split()], jnp.dtype(shape.dtype))

    controls = {name: array(control.axes) for name, control in memory.controls.items()}
    weights = {
        name: jax.ShapeDtypeStruct((shape.heads, *size), jnp.float32)
        for name, size in memory.weight_shapes(shape.keys, shape.values).items()
    }
    arrays = [array("b t h k"), array("b t h k"), array("b t h v"), array("b t h k")]

    def loss(arrays: Any, controls: Any, weights: Any) -> Any:
        y = mc.memory_caching(
            *arrays,
            controls=controls,
            weights=weights or None,
            memory=memory,
            aggregation=shape.aggregation,
            segmentation=mc.Constant(shape.segment),
            implementation="pallas_tpu",
        )
        return jnp.sum(y.astype(jnp.float32) ** 2)

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    begin = time.perf_counter()
    try:
        both.lower(*placed((arrays, controls, weights), device)).compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as e:
        return f"failed: {' '.join(str(e).split())[:300]}"
    return f"{time.perf_counter() - begin:.1f} s"
