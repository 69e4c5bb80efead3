"""Memory caching over a mesh: what is refused, and what crosses it."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.sharding import make_mesh
from tests.cases import assert_close, make_inputs
from tests.covers import first_kept

# One goes on over three parts of eight tokens, one begins with a part, an id comes again.
DOCUMENTS = jnp.array([[7] * 3 + [0] * 17 + [7] * 2 + [5] * 2 + [9] * 8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(segmentation=mc.Lengths((8, 16, 8))), "segments of one size, got Lengths"),
        (dict(segmentation=mc.Constant(2**30)), "a segment for each of the 8 devices, got 32"),
        (dict(start="checkpoint"), "independent starts for DLA, whose runs do not compose"),
        (dict(segmentation=mc.Logarithmic(4)), "a Constant segmentation for DLA, or buckets"),
        (dict(implementation="reference"), "not the reference"),
        (
            dict(segmentation=mc.Logarithmic(4), exchange="ring"),
            "a Constant segmentation for a ri",
        ),
        (dict(exchange="star"), "exchange must be one of"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_divided_over_time(options, message):
    memory = mc.memories.DLA(chunk_size=4, expansion=2)
    inputs = jax.tree.map(jnp.float32, make_inputs(memory, 32, batch=1, heads=2))
    options = dict(segmentation=mc.Constant(4)) | options
    with (
        jax.set_mesh(make_mesh(dict(seq=8))),
        pytest.raises(ValueError, match=message),
    ):
        mc.memory_caching(**inputs, memory=memory, aggregation=mc.GRM(), **options)


@pytest.mark.parametrize(
    "memory", first_kept(1, [mc.memories.GatedDeltaNet(), mc.memories.SSD()]), ids=type
)
def test_the_state_of_one_segment_goes_on_over_all_parts(memory):
    inputs = jax.tree.map(jnp.float32, make_inputs(memory, 30, batch=1, heads=2))

    def run(inputs, document_ids):
        how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(2**30))

        def outputs(inputs):
            return mc.memory_caching(**inputs, **how, document_ids=document_ids)

        y, back = jax.vjp(outputs, inputs)
        return y, back(jnp.cos(y))

    for documents in (None, DOCUMENTS[:, :30]):
        wanted = jax.jit(run)(inputs, documents)
        with jax.set_mesh(make_mesh(dict(seq=8))):
            got = jax.jit(run)(inputs, documents)
        for x, y in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            assert_close(jax.device_get(x), y, 1e-5)


@pytest.mark.parametrize(
    "mesh", first_kept(1, [dict(data=2, tensor=4), dict(data=8), dict(tensor=8)]), ids=str
)
def test_rows_and_heads_that_do_not_divide_are_whole(mesh):
    memory = mc.memories.LinearAttention()
    inputs = jax.tree.map(jnp.float32, make_inputs(memory, 32, batch=1, heads=2))
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(4))
    wanted = mc.memory_caching(**inputs, **how)
    with jax.set_mesh(make_mesh(mesh)):
        got = jax.jit(lambda inputs: mc.memory_caching(**inputs, **how))(inputs)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("exchange", first_kept(1, ["ring", "gather"]))
def test_no_token_crosses_the_mesh_within_the_memory(exchange):

    (b, t, h, k), size, parts = (2, 512, 2, 8), 64, 8

    def loss(q, k, v, u):
        y = mc.memory_caching(
            *(q, k, v, u),
            memory=mc.memories.LinearAttention(),
            aggregation=mc.GRM(),
            segmentation=mc.Constant(size),
            exchange=exchange,
        )
        return jnp.sum(y**2)

    with jax.set_mesh(make_mesh(dict(seq=parts))):
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, "seq"))
        rows = jax.ShapeDtypeStruct((b, t, h, k), jnp.float32, sharding=sharding)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        text = gradient.lower(*[rows] * 4).compile().as_text() or ""
    largest = {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 0, "collective-permute": 0}
    for dims, kind in re.findall(r"= f32\[([\d,]+)\]\S* ([a-z-]+)\(", text):
        if kind in largest:
            largest[kind] = max(largest[kind], int(np.prod([int(n) for n in dims.split(",")])))
    pooled = b * h * t // size * k
    states = pooled * k
    assert states < b * t * h * k
    if exchange == "gather":
        assert largest["all-gather"] == states
        assert largest["collective-permute"] == 0
    else:
        # What is gathered is the pooled keys alone.
        assert largest["all-gather"] == pooled
        assert largest["collective-permute"] == states // parts
    assert max(largest["all-reduce"], largest["reduce-scatter"]) <= states


@pytest.mark.slow
@pytest.mark.parametrize("memory", [mc.memories.SSD(), mc.memories.KDA()], ids=type)
def test_a_part_hears_of_those_before_in_hops_of_one_run(memory):
    (b, h, k, v), parts = (1, 2, 8, 16), 8
    inputs = make_inputs(memory, 128, batch=b, heads=h, dim=k, value_dim=v, dtype=np.float32)

    def outputs(inputs):
        how: Any = dict(aggregation=mc.Residual(), segmentation=mc.Constant(16))
        return mc.memory_caching(**inputs, memory=memory, start="checkpoint", **how)

    with jax.set_mesh(make_mesh(dict(seq=parts))):
        text = jax.jit(outputs).lower(inputs).compile().as_text() or ""
    hops = re.findall(r"= f32\[([\d,]+)\]\S* collective-permute\(", text)
    sizes = [int(np.prod([int(n) for n in dims.split(",")])) for dims in hops]
    transition = h * k * (k if memory.erases else 1)
    # Three hops of a run and one of the state before; the last of them needs no transition.
    assert sorted(sizes) == sorted([b * h * k * v] * 4 + [b * transition] * 2)
