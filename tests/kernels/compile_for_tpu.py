"""Compiles every kernel for one kind of TPU, and prints the kernels in the compiled programs.

A program of its own, because libtpu ends a process whose XLA_FLAGS it does not know.

Command: python -m tests.kernels.compile_for_tpu v5e:2x2
"""

import json
import os
import re
import sys

import jax
import jax.numpy as jnp

import memcache_jax as mc
from memcache_jax._reads import blind_where_gates_are_zero
from memcache_jax.kernels.bank_read import bank_read
from memcache_jax.kernels.grouped_read import tpu as grouped_read
from memcache_jax.kernels.ssc_route import ssc_route

BLOCKS, ROWS, K, TOP_K = 64, 256, 128, 4
READS = mc.Constant(ROWS).plan(BLOCKS * ROWS).reads
LINEAR, DEEP = mc.memories.LinearAttention(), mc.memories.Titans()


def shapes(*every, dtype=jnp.float32):
    """Arrays of one batch row and two heads."""
    return tuple(jax.ShapeDtypeStruct((1, 2, *shape), dtype) for shape in every)


def with_vjp(function):
    def both(*arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(jax.tree.map(jnp.cos, y))

    return both


def read_bank(read):
    return with_vjp(
        lambda bank, query, gates: bank_read(
            read, bank, query, gates, READS, implementation="pallas_tpu"
        )
    )


def read_groups(bank, rows, weights):
    """The kernels alone: sorts and gathers around them take minutes to compile.

    Some TPUs run those gathers on cores of their own, in programs that cannot be printed.
    """
    kernels = grouped_read._Kernels(LINEAR.read, ROWS, K, 0)
    state = jax.lax.broadcasted_iota(jnp.int32, rows.shape[:2], 1) // 4
    y = kernels.forward(state, bank, rows, weights)
    return y, kernels.backward(state, bank, rows, weights, jnp.cos(y))


def route(connector, pooled, online):
    return ssc_route(connector, pooled, online, READS, TOP_K, implementation="pallas_tpu")[:2]


def bank_of(*layers):
    return shapes(*((BLOCKS - 1, *layer) for layer in layers))


ROWS_AND_GATES = shapes((BLOCKS, ROWS, K), (BLOCKS, ROWS, BLOCKS - 1))
CASES = {
    "bank_read": (read_bank(LINEAR.read), (bank_of((K, K)), *ROWS_AND_GATES)),
    "bank_read, documents": (
        read_bank(blind_where_gates_are_zero(DEEP.read)),
        (bank_of((K, 4 * K), (4 * K, K)), *ROWS_AND_GATES),
    ),
    "bank_read, largest": (
        read_bank(DEEP.read),
        (
            bank_of((256, 1024), (1024, 256)),
            *shapes((BLOCKS, ROWS, 256), (BLOCKS, ROWS, BLOCKS - 1), dtype=jnp.bfloat16),
        ),
    ),
    "grouped_read": (
        read_groups,
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
            (bank_of((K, K)), *shapes((4 * BLOCKS, ROWS, K), (4 * BLOCKS, ROWS))),
        ),
    ),
    "ssc_route": (
        with_vjp(route),
        shapes((BLOCKS, ROWS, K), (BLOCKS - 1, K), (BLOCKS, ROWS)),
    ),
}


def compiled_kernels(device, function, arguments):
    """The kernels in the compiled program of a function."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    return sorted(set(re.findall(r"(?:bank_read|grouped_read|ssc_route)_[a-z_]*[a-z]", text)))


if __name__ == "__main__":
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
    names = {name: compiled_kernels(topology.devices[0], *case) for name, case in CASES.items()}
    print(json.dumps(names))
