"""Compiles gated DeltaNet's kernels and what is around them for a TPU that need not exist.

Prints the bytes that pass through the chip's memories, by the compiler's count, for each byte of
arguments and results: forward, and with gradients. Run by ``test_tpu.py``, in a program of its own
for libtpu's sake.

Command: python -m tests.kernels.compile_traffic v5e
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp

import memcache_jax as mc
from experiments._compilers import described_tpu, placed

HEADS, TOKENS, DIM = 2, 1024, 128


def forward(rows):
    """What a sequence of one segment reads."""
    return mc.memory_caching(
        **rows,
        memory=mc.memories.GatedDeltaNet(),
        aggregation=mc.Residual(),
        segmentation=mc.Constant(TOKENS),
        implementation="pallas_tpu",
    )


def both(rows):
    """The same with gradients."""
    y, pull = jax.vjp(forward, rows)
    return y, pull(y)


def main(chip):
    """Prints a line for each pass."""
    device = described_tpu(chip)
    per_head = jax.ShapeDtypeStruct((1, TOKENS, HEADS), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((*per_head.shape, DIM), jnp.bfloat16)
    rows: dict[str, Any] = dict.fromkeys(("query", "key", "value"), tokens)
    rows["controls"] = dict.fromkeys(mc.memories.GatedDeltaNet().controls, per_head)
    for function in (forward, both):
        compiled: Any = jax.jit(function).lower(*placed((rows,), device)).compile()
        memory = compiled.memory_analysis()
        passed = memory.argument_size_in_bytes + memory.output_size_in_bytes
        print(function.__name__, compiled.cost_analysis()["bytes accessed"] / passed, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
