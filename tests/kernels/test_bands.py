"""States too large for a Triton program are read band by band."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.kernels import _shapes
from memcache_jax.kernels._dispatch import interpret_kernels
from memcache_jax.kernels._shapes import fits_triton
from memcache_jax.kernels._triton import lowered_for_gpu
from memcache_jax.kernels.bands import bands_of_matrix, bands_of_network
from tests.cases import assert_close, make_inputs, normals, value_and_vjp
from tests.covers import first_kept, kept_of

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


@pytest.mark.parametrize("case", kept_of(CASES, "soup", "matrix"))
def test_memory_caching(monkeypatch, case):
    memory, aggregation, dim, limit, *ids = case
    inputs = make_inputs(memory, 14, batch=1, heads=1, dim=dim, dtype=np.float32)
    inputs = jax.tree.map(jnp.asarray, inputs)
    calls = []

    def fits(shapes):
        calls.append(fits_triton(shapes))
        return calls[-1]

    monkeypatch.setattr(_shapes, "_COMFORTABLE_STATE", limit)
    monkeypatch.setattr("memcache_jax.kernels.bands.fits_triton", fits)
    with interpret_kernels():
        got = outputs(memory, aggregation, inputs, "pallas_gpu", *ids)
    assert False in calls
    assert True in calls
    wanted = outputs(memory, aggregation, inputs, "xla", *ids)
    assert_close(got[0], wanted[0], 1e-6)
    # Pieces round apart, and the gates' gradients are small differences of their sums.
    assert_close(got[1], wanted[1], 1e-5)


@pytest.mark.usefixtures("every_platform")
@pytest.mark.parametrize(("key_dim", "dtype"), first_kept(1, [(96, "bfloat16"), (128, "float32")]))
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


DIVISIONS = {  # how a memory's states are divided, and the bands that hold half of a state
    "matrix": (LINEAR, bands_of_matrix, [(8, 8)], 2),
    "network": (TITANS, bands_of_network, [(8, 12), (12, 8)], 2),
    "uneven network": (TITANS, bands_of_network, [(6, 9), (9, 6)], 3),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", DIVISIONS.values(), ids=DIVISIONS)
def test_pieces_add_up_to_the_read(case):
    memory, divide, shapes, count = case
    normal = normals(0)
    matrices = tuple(jnp.asarray(normal(*shape)) for shape in shapes)
    query, gate = jnp.asarray(normal(5, shapes[0][0])), jnp.linspace(-1, 2, 5)
    half = sum(m.size for m in matrices) // 2

    def fits(shapes):
        return sum(rows * columns for rows, columns in shapes) <= half

    def summed(matrices, query, gate):
        bands = divide(memory.read, matrices, query, fits)
        assert len(bands) == count
        assert all(fits([m.shape for m in band.matrices]) for band in bands)
        return sum(band.read(band.matrices, band.query, gate) for band in bands)

    got, wanted = (
        value_and_vjp(function, matrices, query, gate) for function in (summed, memory.read)
    )
    assert_close(got, wanted, 1e-12)
    (whole,) = divide(memory.read, matrices, query, lambda shapes: True)
    np.testing.assert_array_equal(
        whole.read(whole.matrices, whole.query, gate), memory.read(matrices, query, gate)
    )


def test_bfloat16_networks_have_gelu_in_float32():
    matrices = (jnp.ones((16, 32), jnp.bfloat16), jnp.ones((32, 16), jnp.bfloat16))
    query = jnp.linspace(-1, 1, 32, dtype=jnp.bfloat16).reshape(2, 16)
    bands = bands_of_network(TITANS.read, matrices, query, lambda shapes: shapes[0][1] <= 16)
    for band in bands:
        program = str(jax.make_jaxpr(band.read)(band.matrices, band.query))
        (line,) = (line for line in program.splitlines() if " tanh " in line)
        assert "f32[" in line


@pytest.mark.slow
@pytest.mark.parametrize("memory", [mc.memories.LinearAttention(), mc.memories.Titans()])
def test_gradients_of_gates_are_summed_in_float32(memory):
    shapes = {1: [(4, 4)], 2: [(4, 16), (16, 4)]}[memory.depth]
    matrices = tuple(jnp.ones(shape, jnp.bfloat16) for shape in shapes)
    query, gate = jnp.ones((3, 4), jnp.bfloat16), jnp.ones(3, jnp.bfloat16)

    def gradient(gate, cotangent):
        return jax.vjp(lambda gate: memory.read(matrices, query, gate), gate)[1](cotangent)[0]

    sums = re.findall(r"(\w+)\[[0-9,]*\] = reduce_sum", str(jax.make_jaxpr(gradient)(gate, query)))
    assert sums
    assert {*sums} == {"f32"}
