"""Compiles the updates' kernels for a TPU that need not exist: names of the kernels in the program.

Run by ``test_chunk_update_tpu.py``, since the flags of other tests' CPU programs end this one.
"""

import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import memcache_jax as mc
from memcache_jax.kernels.affine_update import AffineChunk, affine_update
from memcache_jax.kernels.chunk_update import chunk_update

CHUNKS, M = 4, 64  # a segment of 256 tokens


def affine(shape, keys, erases):
    """Forward and backward of matrices (keys, keys), their maps given."""
    form = AffineChunk(
        decay=shape(CHUNKS, keys),
        value=shape(CHUNKS, M, keys),
        key=shape(CHUNKS, M, keys),
        query=shape(CHUNKS, M, keys),
        scores=shape(CHUNKS, M, M),
        erase=shape(CHUNKS, M, keys) if erases else None,
    )

    def update(state, form):
        return affine_update(
            lambda rows: rows, state, form, batch_dims=1, keep=CHUNKS, implementation="pallas_tpu"
        )

    return update, shape(keys, keys), form


def titans(shape, keys):
    """Forward and backward of Titans."""
    memory = mc.memories.Titans(chunk_size=M)

    def chunk(state, rows):
        query, key, value, controls = rows
        end, view = memory.write(state, state, key, value, controls)
        return end, memory.read_online(view, query)

    def update(state, rows):
        return chunk_update(chunk, state, rows, batch_dims=1, implementation="pallas_tpu")

    shapes = memory.weight_shapes(keys, keys)
    weights = {name: jnp.zeros(size) for name, size in shapes.items()}
    state = jax.eval_shape(lambda: memory.init(weights, keys, keys, jnp.float32))
    state = jax.tree.map(lambda x: shape(*x.shape), state)
    rows = (*[shape(CHUNKS, M, keys)] * 3, {name: shape(CHUNKS, M) for name in memory.controls})
    return update, state, rows


def main(topology):
    """Prints the kernels of each program."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shape(*sizes):
        return jax.ShapeDtypeStruct((8, *sizes), jnp.float32, sharding=sharding)

    cases = {
        "decay": affine(shape, 64, False),
        "delta": affine(shape, 128, True),
        "titans": titans(shape, 64 if topology == "v5e:2x2" else 128),
    }
    for name, (update, *arguments) in cases.items():

        def both(*arguments, update=update):
            y, pull = jax.vjp(update, *arguments)
            return y, pull(y)

        text = jax.jit(both).lower(*arguments).compile().as_text()
        calls = "".join(line for line in (text or "").splitlines() if "tpu_custom_call" in line)
        print(name, *sorted(set(re.findall(r"[a-z]+_update_(?:forward|backward)", calls))))


if __name__ == "__main__":
    main(sys.argv[1])
