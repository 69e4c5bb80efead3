"""Memory caching over parts of a sequence equals memory caching on one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.kernels._dispatch import interpret_kernels
from memcache_jax.sharding import make_mesh
from tests.cases import assert_close, make_inputs
from tests.covers import first_kept, kept_of, product
from tests.kernels.interpreters import KERNELS

pytestmark = pytest.mark.slow

# One goes on over three parts of eight tokens, one begins with a part, an id comes again.
DOCUMENTS = jnp.array([[7] * 3 + [0] * 17 + [7] * 2 + [5] * 2 + [9] * 8])
CASES = {
    "soup": (mc.memories.Titans(chunk_size=4, expansion=2), mc.Soup(), mc.Constant(8), {}),
    "checkpoint": (mc.memories.SWLA(), mc.GRM(), mc.Constant(4), dict(start="checkpoint")),
    "channels": (mc.memories.GLA(), mc.Residual(), mc.Constant(4), dict(start="checkpoint")),
    "delta, carried on": (mc.memories.GDN2(), mc.GRM(), mc.Constant(4), dict(start="checkpoint")),
    "delta, log": (mc.memories.GatedDeltaNet(), mc.SSC(top_k=2), mc.Logarithmic(4), {}),
    "delta, log, carried on": (
        mc.memories.RWKV7(),
        mc.GRM(),
        mc.Logarithmic(4),
        dict(start="checkpoint"),
    ),
    "log, carried on": (mc.memories.SSD(), mc.GRM(), mc.Logarithmic(4), dict(start="checkpoint")),
    "log": (mc.memories.GLA(), mc.SSC(top_k=2), mc.Logarithmic(4), {}),
    "a decay of heads": (mc.memories.RetNet(), mc.GRM(pooling="sum"), mc.Constant(4), {}),
    "positions": (mc.memories.DeltaNet(), mc.GRM(gate="position"), mc.Constant(4), {}),
    "uniform": (mc.memories.LinearAttention(), mc.GRM(gate="uniform"), mc.Constant(4), {}),
    "ring, layer by layer": (
        mc.memories.Titans(chunk_size=4, expansion=2),
        mc.Soup(),
        mc.Constant(4),
        dict(exchange="ring"),
    ),
    "ring, carried on": (
        mc.memories.SWLA(),
        mc.Residual(),
        mc.Constant(4),
        dict(start="checkpoint", exchange="ring"),
    ),
    "ring, selected": (
        mc.memories.DeltaNet(),
        mc.SSC(top_k=2),
        mc.Constant(4),
        dict(exchange="ring"),
    ),
    "documents": (
        mc.memories.Titans(chunk_size=4, expansion=2),
        mc.GRM(),
        mc.Constant(4),
        dict(document_ids=DOCUMENTS[:, :30]),
    ),
    "documents, carried on": (
        mc.memories.KDA(),
        mc.GRM(),
        mc.Constant(4),
        dict(document_ids=DOCUMENTS[:, :30], start="checkpoint"),
    ),
    "documents, ring, carried on": (
        mc.memories.SWLA(),
        mc.GRM(),
        mc.Constant(4),
        dict(document_ids=DOCUMENTS[:, :30], start="checkpoint", exchange="ring"),
    ),
    "documents, log": (
        mc.memories.SSD(),
        mc.SSC(top_k=2, pooling="sum"),
        mc.Logarithmic(4),
        dict(document_ids=DOCUMENTS[:, :30]),
    ),
    "documents, log, carried on": (
        mc.memories.SWLA(),
        mc.GRM(gate="position"),
        mc.Logarithmic(4),
        dict(document_ids=DOCUMENTS[:, :30], start="checkpoint"),
    ),
    "documents, ring, selected": (
        mc.memories.SWLA(),
        mc.SSC(top_k=2, pooling="sum"),
        mc.Constant(4),
        dict(document_ids=DOCUMENTS[:, :30], exchange="ring"),
    ),
}

# Every form, aggregation, segmentation, start, exchange and gate, with documents and without.
FEW = (
    "soup",
    "channels",
    "delta, log, carried on",
    "positions",
    "uniform",
    "ring, selected",
    "documents, log",
    "documents, ring, carried on",
)


def both(function, inputs, **options):
    """The outputs, and the gradients of their squares, in one program."""

    @jax.jit
    def run(inputs):
        y, pull = jax.vjp(lambda inputs: function(**inputs, **options), inputs)
        return y, pull(2 * y)

    return run(inputs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", kept_of(CASES, *FEW))
def test_parts_of_a_sequence(case):
    memory, aggregation, segmentation, options = case
    options = dict(memory=memory, aggregation=aggregation, segmentation=segmentation, **options)
    inputs = make_inputs(memory, 30, batch=1, heads=2)
    with jax.set_mesh(make_mesh(dict(seq=4, tensor=2))):
        got = both(mc.memory_caching, inputs, **options)
    options.pop("exchange", None)
    wanted = both(mc.memory_caching, inputs, **options)
    assert_close(got[0], wanted[0], 1e-12)
    assert_close(got[1], wanted[1], 1e-10, scale=1.0)


@pytest.mark.usefixtures("x64")
def test_a_layer_keeps_documents_apart_over_parts():
    layer = mc.nn.MemoryCaching(
        8,
        2,
        memory=mc.memories.LinearAttention(),
        aggregation=mc.Residual(),
        segmentation=mc.Constant(4),
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (1, 32, 8), jnp.float64)
    graph, state = nnx.split(layer)

    def loss(x):
        y = nnx.merge(graph, state)(x, DOCUMENTS)
        return jnp.sum(y**2), y

    def run():
        return jax.jit(jax.grad(loss, has_aux=True))(x)

    wanted = run()
    with jax.set_mesh(make_mesh(dict(seq=8))):
        assert_close(run(), wanted, 1e-12)


@functools.cache
def buckets_of_documents():
    """Arguments with buckets of up to four blocks that follow documents, and both on one device."""
    memory = mc.memories.GatedDeltaNet()
    inputs = make_inputs(memory, 32, heads=2)
    options: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Logarithmic(2))
    options["document_ids"] = jnp.concatenate([DOCUMENTS, DOCUMENTS[:, ::-1]])
    return inputs, options, both(mc.memory_caching, inputs, **options)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("parts", first_kept(1, [4, 2, 8]))
def test_buckets_of_documents(parts):
    inputs, options, wanted = buckets_of_documents()
    with jax.set_mesh(make_mesh(dict(seq=parts), devices=jax.devices()[:parts])):
        got = both(mc.memory_caching, inputs, **options)
    assert_close(got[0], wanted[0], 1e-12)
    assert_close(got[1], wanted[1], 1e-10, scale=1.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("parts", first_kept(1, [2, 4]))
def test_fewer_parts_that_carry_on(parts):
    memory = mc.memories.GatedDeltaNet()
    inputs = make_inputs(memory, 61, batch=1, heads=2)
    options: Any = dict(memory=memory, aggregation=mc.GRM(), start="checkpoint")
    options |= dict(segmentation=mc.Constant(4))
    with jax.set_mesh(make_mesh(dict(seq=parts), devices=jax.devices()[:parts])):
        got = both(mc.memory_caching, inputs, **options)
    wanted = both(mc.memory_caching, inputs, **options)
    assert_close(got[0], wanted[0], 1e-12)
    assert_close(got[1], wanted[1], 1e-10, scale=1.0)


@pytest.mark.parametrize(
    ("memory", "implementation"),
    product(dict(swla=mc.memories.SWLA(), kda=mc.memories.KDA()), KERNELS, turn=0),
)
def test_kernels_carry_on_over_parts(memory, implementation):
    inputs = make_inputs(memory, 30, batch=1, heads=2, dtype=jnp.float32)
    options: Any = dict(memory=memory, aggregation=mc.GRM(), start="checkpoint")
    options |= dict(segmentation=mc.Constant(8))
    with interpret_kernels(), jax.set_mesh(make_mesh(dict(seq=4, tensor=2))):
        got = both(mc.memory_caching, inputs, **options, implementation=implementation)
    wanted = both(mc.memory_caching, inputs, **options)
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


@pytest.mark.usefixtures("x64")
def test_a_number_that_is_not_finite_ends_with_its_document_over_parts():
    memory = mc.memories.GatedDeltaNet()
    inputs = make_inputs(memory, 30, batch=1, heads=2)
    inputs["value"][0, 5, 0, 1] = jnp.nan  # of the document that goes on over three parts
    options: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(4))
    options |= dict(start="checkpoint", document_ids=DOCUMENTS[:, :30])
    run = jax.jit(lambda inputs: mc.memory_caching(**inputs, **options))
    with jax.set_mesh(make_mesh(dict(seq=4), devices=jax.devices()[:4])):
        got = run(inputs)
    spoilt = jnp.isnan(got).any(axis=-1)[0]
    assert spoilt[5:20, 0].all()
    assert not spoilt[:5].any()
    assert not spoilt[20:].any()
    assert not spoilt[:, 1].any()
