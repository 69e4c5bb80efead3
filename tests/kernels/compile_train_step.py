"""Compiles whole train steps with kernels for a TPU that need not exist.

Prints for each model the seconds and the kernels in the compiled program. Run by
``test_tpu_compile.py``, in a program of its own for libtpu's sake.

Command: python -m tests.kernels.compile_train_step v5e:2x2
"""

import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments._compilers import KERNEL
from memcache_jax.training import default_config
from memcache_jax.training.models import model_config
from memcache_jax.training.optimizer import make_optimizer
from memcache_jax.training.step import abstract_state, make_train_step

MODELS = {
    "titans_grm": (dict(name="Titans", chunk_size=32), dict(name="GRM")),
    "gated_delta_net_ssc": (dict(name="GatedDeltaNet"), dict(name="SSC", top_k=1)),
    "kda_grm": (dict(name="KDA"), dict(name="GRM")),
}
SIZES = dict(vocab_size=257, num_layers=1, features=128, num_heads=2, mlp_features=128)


def train_step(name) -> tuple[Any, tuple]:
    """The jitted step of a model, and the shapes of its arguments."""
    memory, aggregation = MODELS[name]
    config = default_config()
    config.model.update(SIZES, implementation="pallas_tpu")
    config.model.memory, config.model.aggregation = memory, aggregation
    config.model.segmentation.size = 64
    optimizer = make_optimizer(config.optimizer, 100)
    graph, state = abstract_state(model_config(config.model), optimizer)
    tokens = jax.ShapeDtypeStruct((1, 257), jnp.int32)
    return make_train_step(graph, optimizer), (state, tokens)


def main(topology, *names):
    """Prints a line for each model."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    # Programs of the sparse cores, to which gathers would go, cannot be printed.
    flags = (f"--xla_tpu_enable_offloading_{x}_to_sparsecore=false" for x in ("gather", "scatter"))
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags)
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    for name in names or MODELS:
        step, arguments = train_step(name)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
        )
        lowered = step.lower(*arguments)
        begin = time.perf_counter()
        text = lowered.compile().as_text() or ""
        calls = "".join(line for line in text.splitlines() if "tpu_custom_call" in line)
        seconds = time.perf_counter() - begin
        print(name, f"{seconds:.0f}", *sorted(set(KERNEL.findall(calls))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
