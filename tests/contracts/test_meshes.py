"""A train step on eight devices gives the loss and the gradient of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memcache_jax as mc
from memcache_jax.sharding import AXES, batch_sharding, make_mesh
from memcache_jax.training.step import abstract_state, create_state, make_train_step
from tests.covers import first_kept

pytestmark = pytest.mark.slow

MIXERS = {
    "titans grm": mc.nn.MemoryCachingMixer(mc.memories.Titans(4, 2), mc.GRM(), mc.Constant(4)),
    "gated_deltanet ssc": mc.nn.MemoryCachingMixer(
        mc.memories.GatedDeltaNet(), mc.SSC(top_k=2), mc.Constant(4)
    ),
    "swla log_linear": mc.nn.MemoryCachingMixer(mc.memories.SWLA(), mc.GRM(), mc.Logarithmic(4)),
    "transformer": mc.nn.AttentionMixer(),
    "memory as context": mc.nn.MemoryAsContextMixer(
        mc.nn.MemoryCachingMixer(mc.memories.SSD(), mc.GRM(), mc.Constant(4)), window=8
    ),
}
TITANS, DELTA, LOG, *_ = MIXERS
# Attention's; of the others each has some, for what divides rows and heads is the same for all.
SHAPES = ((1, 2, 2, 2), (1, 1, 8, 1), (1, 1, 1, 8), (2, 2, 2, 1))
# A rate of one: the change of a parameter is its gradient.
OPTIMIZER = optax.sgd(1.0)
TOKENS = np.random.default_rng(0).integers(0, 16, (8, 33)).astype(np.int32)


def model(name, dtype, exchange="gather"):
    mixer = MIXERS[name]
    if exchange != "gather":
        mixer = dataclasses.replace(mixer, exchange=exchange)
    return mc.nn.LanguageModelConfig(
        vocab_size=16,
        num_layers=1,
        features=32,
        num_heads=8,
        mlp_features=32,
        mixers=(mixer,),
        dtype=dtype,
        param_dtype=dtype,
    )


@functools.lru_cache
def first_state(name, dtype):
    """A state's arrays on one device."""
    return jax.device_get(create_state(model(name, dtype), OPTIMIZER, 0))


@functools.lru_cache
def on_one_device(name, dtype, **options):
    graph, _ = abstract_state(model(name, dtype), OPTIMIZER)
    state = jax.tree.map(jnp.asarray, first_state(name, dtype))
    train_step = make_train_step(graph, OPTIMIZER, **options)
    return jax.device_get(train_step(state, jnp.asarray(TOKENS)))


def on_mesh(name, dtype, shape, exchange="gather", **options):
    mesh, config = make_mesh(dict(zip(AXES, shape, strict=True))), model(name, dtype, exchange)
    with jax.set_mesh(mesh):
        graph, target = abstract_state(config, OPTIMIZER, mesh)
        state = jax.tree.map(
            lambda x, y: jax.device_put(x, y.sharding), first_state(name, dtype), target
        )
        tokens = jax.device_put(TOKENS, batch_sharding(mesh))
        return jax.device_get(make_train_step(graph, OPTIMIZER, **options)(state, tokens))


def assert_same(got, wanted, tolerance):
    (state, metrics), (state_wanted, metrics_wanted) = got, wanted
    np.testing.assert_allclose(metrics["loss"], metrics_wanted["loss"], rtol=tolerance)
    scale = metrics_wanted["gradient_norm"]
    np.testing.assert_allclose(metrics["gradient_norm"], scale, rtol=10 * tolerance)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance * scale),
        state.params,
        state_wanted.params,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "shape"),
    first_kept(
        4,
        [
            (TITANS, (1, 1, 8, 1)),
            (DELTA, (1, 2, 2, 2)),
            (LOG, (1, 1, 1, 8)),
            (LOG, (1, 2, 2, 2)),
            (TITANS, (8, 1, 1, 1)),
            (DELTA, (1, 8, 1, 1)),
            (DELTA, (1, 1, 8, 1)),
            (LOG, (1, 1, 8, 1)),
            (DELTA, (2, 2, 2, 1)),
            (TITANS, (1, 2, 2, 2)),
        ],
    ),
    ids=str,
)
def test_every_mesh_gives_the_gradient_of_one_device(name, shape):
    got = on_mesh(name, jnp.float64, shape)
    assert_same(got, on_one_device(name, jnp.float64), 1e-10)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *first_kept(2, [("transformer", shape) for shape in SHAPES]),
        # Of eight parts of a sequence each is half a window, of two it is whole windows.
        *first_kept(1, [("memory as context", shape) for shape in ((1, 1, 8, 1), (1, 2, 2, 2))]),
    ],
    ids=str,
)
def test_every_mesh_gives_the_gradient_of_attention(name, shape):
    """In float32, in which JAX has its softmax."""
    got = on_mesh(name, jnp.float32, shape)
    assert_same(got, on_one_device(name, jnp.float32), 1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "shape"),
    first_kept(1, [(DELTA, (1, 2, 2, 2)), (TITANS, (1, 2, 2, 2)), (DELTA, (1, 1, 8, 1))]),
    ids=str,
)
def test_states_in_a_ring_give_the_gradient_of_one_device(name, shape):
    got = on_mesh(name, jnp.float64, shape, exchange="ring")
    assert_same(got, on_one_device(name, jnp.float64), 1e-10)


def test_parts_of_a_batch_give_the_same_gradient():
    got = on_mesh("transformer", jnp.float32, (4, 1, 1, 2), accumulate=2)
    assert_same(got, on_one_device("transformer", jnp.float32), 1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    first_kept(
        2,
        [
            (TITANS, (1, 2, 2, 2)),
            ("transformer", (1, 1, 8, 1)),
            (DELTA, (1, 1, 8, 1)),
            ("transformer", (1, 2, 2, 2)),
            ("memory as context", (1, 2, 2, 2)),
        ],
    ),
    ids=str,
)
def test_packed_documents_give_the_gradient_of_one_device(name, shape):
    """Token 3 ends them, two in a row on average."""
    got = on_mesh(name, jnp.float32, shape, end_token=3)
    wanted = on_one_device(name, jnp.float32, end_token=3)
    assert_same(got, wanted, 1e-5)
    assert abs(wanted[1]["loss"] - on_one_device(name, jnp.float32)[1]["loss"]) > 1e-4


def test_parts_of_a_batch_with_documents_give_the_same_gradient():
    got = on_mesh("transformer", jnp.float32, (4, 1, 1, 2), accumulate=2, end_token=3)
    assert_same(got, on_one_device("transformer", jnp.float32, end_token=3), 1e-5)
