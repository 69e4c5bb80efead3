"""Compiles a train step for a TPU slice that need not exist: states in a ring, and on the host.

Prints the bytes of temporaries on the host, and how many hops of the ring are under way while
states are read. Run by ``test_ring.py``, in a program of its own for libtpu's sake.

Command: python -m tests.sharding.compile_pod
"""

import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

import memcache_jax as mc
from memcache_jax.sharding import batch_sharding, make_mesh
from memcache_jax.training.step import abstract_state, make_train_step


def main():
    """Prints one line."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh(dict(fsdp=2, seq=2, tensor=2), devices=devices)
    mixer = mc.nn.MemoryCachingMixer(
        mc.memories.LinearAttention(), mc.GRM(), mc.Constant(64), exchange="ring"
    )
    model = mc.nn.LanguageModelConfig(
        vocab_size=256,
        num_layers=2,
        features=128,
        num_heads=2,
        mlp_features=128,
        mixers=(mixer,),
        remat=True,
        offload_states=True,
        dtype=jnp.bfloat16,
    )
    optimizer = optax.adam(1e-3)
    graph, target = abstract_state(model, optimizer, mesh)
    with jax.set_mesh(mesh):
        tokens = jax.ShapeDtypeStruct((8, 513), jnp.int32, sharding=batch_sharding(mesh))
        step: Any = make_train_step(graph, optimizer, target=target)
        compiled = step.lower(target, tokens).compile(
            compiler_options={"exec_time_optimization_effort": -1.0}
        )
    memory: Any = compiled.memory_analysis()
    # The text is in the order of execution.
    hops, during = r"collective-permute-start\(.*?collective-permute-done\(", 0
    for hop in re.findall(hops, compiled.as_text() or "", re.DOTALL):
        during += " while(" in hop
    print(json.dumps(dict(host=memory.host_temp_size_in_bytes, hops_during_reads=during)))


if __name__ == "__main__":
    main()
