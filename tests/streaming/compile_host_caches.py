"""Compiles a stream's step for a TPU that need not exist, cached states on the host: JSON.

Run by ``test_storage.py``, since the flags of other tests' CPU programs end this one.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import memcache_jax as mc

ROWS, HEADS, DIM, SEGMENTS = 2, 4, 64, 512


def analyze(memory, struct):
    """What a step of one token holds, in bytes."""
    weights = {
        name: jnp.zeros((HEADS, *shape)) for name, shape in memory.weight_shapes(DIM, DIM).items()
    }
    init = functools.partial(
        mc.init_cache,
        *(ROWS, HEADS, DIM, DIM),
        memory=memory,
        aggregation=mc.SSC(top_k=4),
        segmentation=mc.Constant(256),
        placement="host",
        max_segments=SEGMENTS,
    )
    cache = jax.eval_shape(lambda: init(weights=weights))
    bank = jax.tree.map(lambda x: struct(x, "pinned_host"), cache.bank)
    cache = dataclasses.replace(jax.tree.map(struct, cache), bank=bank)
    token = struct(jax.ShapeDtypeStruct((ROWS, 1, HEADS, DIM), jnp.float32))
    control = struct(jax.ShapeDtypeStruct((ROWS, 1, HEADS), jnp.float32))
    step = jax.jit(mc.extend, donate_argnums=0)
    lowered = step.lower(cache, *[token] * 4, controls=dict.fromkeys(memory.controls, control))
    analysis: Any = lowered.compile().memory_analysis()
    return {
        "bank": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(bank)),
        "device": analysis.argument_size_in_bytes + analysis.temp_size_in_bytes,
        "host_arguments": analysis.host_argument_size_in_bytes,
        "host_in_place": analysis.host_alias_size_in_bytes,
        "host_temporaries": analysis.host_temp_size_in_bytes,
    }


def main():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = jax.sharding.Mesh(topology.devices[:1], ("one",))

    def struct(x, memory_kind="device"):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(), memory_kind=memory_kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    for memory in (mc.memories.LinearAttention(), mc.memories.Titans(chunk_size=64)):
        print(json.dumps(analyze(memory, struct)))


if __name__ == "__main__":
    main()
