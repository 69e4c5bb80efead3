"""States too large for a Triton program are read piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.kernels import _shapes
from memcache_jax.kernels._dispatch import interpret_kernels
from memcache_jax.kernels._shapes import fits_triton
from memcache_jax.kernels._triton import lowered_for_gpu
from tests.cases import assert_close, make_inputs, value_and_vjp

TITANS, LINEAR = mc.memories.Titans(chunk_size=4, expansion=2), mc.memories.LinearAttention()
IDS = np.array([[0] * 4 + [1] * 10])
CASES = {  # 16 filled up to powers of two are 16 x 32 twice, 32 is 32 x 32
    "GRM": (TITANS, mc.GRM(), 16, 1024),
    "soup": (TITANS, mc.Soup(), 16, 256),
    "SSC": (TITANS, mc.SSC(top_k=1), 16, 1024),
    "documents": (TITANS, mc.GRM(), 16, 1024, IDS),
    "matrix": (LINEAR, mc.GRM(), 32, 512),
}


def outputs(memory, aggregation, inputs, implementation, ids=None):
    def run(inputs):
        return mc.memory_caching(
            **inputs,
            memory=memory,
            aggregation=aggregation,
            segmentation=mc.Constant(4),
            document_ids=None if ids is None else jnp.asarray(ids),
            implementation=implementation,
        )

    return value_and_vjp(run, inputs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_memory_caching(monkeypatch, case):
    memory, aggregation, dim, limit, *ids = case
    inputs = make_inputs(memory, 14, batch=1, heads=1, dim=dim, dtype=np.float32)
    inputs = jax.tree.map(jnp.asarray, inputs)
    calls = []

    def fits(shapes):
        calls.append(fits_triton(shapes))
        return calls[-1]

    monkeypatch.setattr(_shapes, "_COMFORTABLE_STATE", limit)
    monkeypatch.setattr("memcache_jax.memories._pieces.fits_triton", fits)
    with interpret_kernels():
        got = outputs(memory, aggregation, inputs, "pallas_gpu", *ids)
    assert False in calls
    assert True in calls
    wanted = outputs(memory, aggregation, inputs, "xla", *ids)
    assert_close(got[0], wanted[0], 1e-6)
    # Pieces round apart, and the gates' gradients are small differences of their sums.
    assert_close(got[1], wanted[1], 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key_dim", [96, 128])
def test_usual_heads_of_deep_memories_lower_to_triton(key_dim, dtype):
    memory = mc.memories.Titans(chunk_size=32)
    inputs = make_inputs(memory, 96, batch=1, heads=1, dim=key_dim)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), inputs)

    def loss(inputs):
        y = mc.memory_caching(
            **inputs,
            memory=memory,
            aggregation=mc.GRM(),
            segmentation=mc.Constant(64),
            implementation="pallas_gpu",
        )
        return y.astype(jnp.float32).sum()

    text = lowered_for_gpu(jax.jit(jax.grad(loss)), inputs).as_text()
    kernels = ("deep_update_backward", "bank_read_backward_bank", "bank_read_backward_rows")
    assert all(kernel in text for kernel in kernels)
