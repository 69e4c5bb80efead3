"""The step: its loss, how the state is made, what an evaluation counts."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.training.data import HeldOut
from memcache_jax.training.optimizer import make_optimizer
from memcache_jax.training.step import (
    abstract_state,
    create_state,
    evaluate,
    make_eval_step,
    make_train_step,
)
from tests.covers import first_kept
from tests.training.steps import OPTIONS, attention, linear, names, options, titans


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 10)), jnp.int32)


@pytest.mark.slow
def test_state_is_plain_and_the_model_comes_back(tokens):
    config, optimizer = attention(), make_optimizer(OPTIONS, 10)
    graph, target = abstract_state(config, optimizer)
    state = create_state(config, optimizer, 3)
    assert jax.tree.structure(state) == jax.tree.structure(target)
    for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
    model = nnx.merge(graph, state.params)
    assert isinstance(model, mc.nn.LanguageModel)
    assert jax.eval_shape(model, tokens).shape == (3, 10, 11)
    again, other = (create_state(config, optimizer, seed) for seed in (3, 4))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert not np.array_equal(other.params["head"]["kernel"], state.params["head"]["kernel"])


@pytest.mark.slow
def test_the_loss_of_bfloat16_is_that_of_logits_in_float32(tokens):
    config = attention(dtype=jnp.bfloat16, tie_embeddings=True)
    optimizer = make_optimizer(OPTIONS, 10)
    graph, _ = abstract_state(config, optimizer)
    state = create_state(config, optimizer, 0)
    model = nnx.merge(graph, state.params)
    matrix = model.embedding.embedding[...].T
    hidden = np.asarray(jax.jit(model.hidden)(tokens[:, :-1]), np.float64)
    logits = hidden @ np.asarray(matrix.astype(jnp.bfloat16), np.float64)
    chosen = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    wanted = (np.log(np.exp(logits).sum(-1)) - chosen).mean()
    _, metrics = make_train_step(graph, optimizer)(state, tokens)
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_state_can_be_sharded_as_it_is_made():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    optimizer = make_optimizer(OPTIONS, 10)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_state(attention(), optimizer)[1],
    )
    state = create_state(attention(), optimizer, 0, target)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_step_follows_the_equations(tokens):
    config, optimizer = attention(), make_optimizer(OPTIONS, 10)
    graph, _ = abstract_state(config, optimizer)
    state = create_state(config, optimizer, 0)

    def objective(params):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        z_loss = 0.01 * jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
        return loss + z_loss, (loss, z_loss)

    gradient, (loss, z_loss) = jax.jit(jax.grad(objective, has_aux=True))(state.params)
    updates, _ = jax.jit(optimizer.update)(gradient, state.opt_state, state.params)
    expected = names(optax.apply_updates(state.params, updates))
    new, metrics = make_train_step(graph, optimizer, z_loss=0.01)(state, tokens)
    for name, leaf in names(new.params).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["z_loss"] == pytest.approx(float(z_loss), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)


def test_step_donates_its_state(tokens):
    config, optimizer = attention(), make_optimizer(OPTIONS, 10)
    graph, _ = abstract_state(config, optimizer)
    state = create_state(config, optimizer, 0)
    make_train_step(graph, optimizer)(state, tokens)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_loss_is_float32_in_bfloat16(tokens):
    config, optimizer = attention(dtype=jnp.bfloat16), make_optimizer(OPTIONS, 10)
    graph, _ = abstract_state(config, optimizer)
    state, metrics = make_train_step(graph, optimizer)(create_state(config, optimizer, 0), tokens)
    assert metrics["loss"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_training_lowers_the_loss(tokens):
    config, optimizer = attention(), make_optimizer(options(learning_rate=0.03), 30)
    graph, _ = abstract_state(config, optimizer)
    state, step = create_state(config, optimizer, 0), make_train_step(graph, optimizer)
    losses = []
    for _ in range(30):
        state, metrics = step(state, tokens)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


END = 10


def words(count, seed=0):
    return np.random.default_rng(seed).integers(0, END, count).tolist()


def summed_loss(model, row):
    """The summed loss of a row, and the number of its targets."""
    graph, _ = abstract_state(model, optax.identity())
    params = create_state(model, optax.identity(), 0).params
    return make_eval_step(graph, END)(params, jnp.asarray([row]), jnp.ones(1))


@pytest.mark.parametrize("model", first_kept(1, dict(titans=titans(), attention=attention())))
def test_no_document_of_a_row_sees_another(model):
    """Wherever it begins: its losses are the same after other words."""
    second = [END, *words(18), END]

    def of_second(first):
        before, _ = summed_loss(model, [*first, END])
        whole, count = summed_loss(model, first + second)
        assert count == len(first) + len(second) - 1
        return whole - before

    losses = [of_second(words(13, seed)) for seed in (1, 2)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@functools.cache
def one_step(model, rows, **options):
    """The state and the metrics after a step on four documents in so many rows."""
    documents = np.reshape([[END, *words(15, seed)] for seed in range(4)], (rows, -1))
    optimizer = optax.sgd(1.0)
    graph, _ = abstract_state(model, optimizer)
    update = make_train_step(graph, optimizer, **options)
    tokens = jnp.asarray([[*row, END] for row in documents])
    return jax.device_get(update(create_state(model, optimizer, 0), tokens))


@pytest.mark.parametrize(
    ("model", "remat", "accumulate"),
    first_kept(
        1,
        {
            "linear remat accumulate": (linear(), True, 2),
            "attention": (attention(), False, 1),
            "attention remat": (attention(), True, 1),
            "attention accumulate": (attention(), False, 2),
        },
    ),
)
def test_a_step_on_packed_documents_is_one_on_each_alone(model, remat, accumulate):
    """They begin on borders of segments."""
    packed, metrics = one_step(
        dataclasses.replace(model, remat=remat), 2, end_token=END, accumulate=accumulate
    )
    alone, metrics_alone = one_step(model, 4)
    mixed, _ = one_step(model, 2)
    assert metrics["loss"] == pytest.approx(metrics_alone["loss"], rel=1e-5)
    close = 1e-5 * metrics_alone["gradient_norm"]
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=close)
    jax.tree.map(same, packed, alone)
    with pytest.raises(AssertionError):
        jax.tree.map(same, mixed, alone)


@pytest.mark.parametrize("batch_size", first_kept(2, [3, 7, 1, 2]))
def test_evaluation_does_not_depend_on_the_batches(batch_size):
    optimizer = make_optimizer(OPTIONS, 10)
    graph, _ = abstract_state(attention(), optimizer)
    params = create_state(attention(), optimizer, 0).params
    model = jax.jit(nnx.merge(graph, params))
    rows = np.random.default_rng(1).integers(0, 11, (5, 10)).astype(np.int32)
    logits = model(rows[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()
    result = evaluate(make_eval_step(graph), params, HeldOut(rows, 2.0), batch_size)
    assert result["heldout_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert result["heldout_bits_per_byte"] == pytest.approx(float(loss) / math.log(2) / 2, rel=1e-5)
    assert result["heldout_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.slow
def test_an_evaluation_in_parts_needs_no_more_memory_than_an_update():
    config, optimizer = attention(vocab_size=256), optax.sgd(1.0)
    graph, target = abstract_state(config, optimizer)
    rows = jax.ShapeDtypeStruct((8, 33), jnp.int32)

    def temporaries(step, *given):
        return step.lower(*given).compile().memory_analysis().temp_size_in_bytes

    update: Any = make_train_step(graph, optimizer, accumulate=8)
    most = temporaries(update, target, rows)
    given = target.params, rows, jax.ShapeDtypeStruct((8,), jnp.float32)
    parts, whole = (make_eval_step(graph, accumulate=count) for count in (8, 1))
    assert temporaries(parts, *given) <= most < temporaries(whole, *given)

    params = create_state(config, optimizer, 0).params
    tokens = np.random.default_rng(0).integers(0, 256, (8, 33)).astype(np.int32)
    mask = np.array([1, 1, 0, 1, 1, 1, 1, 0], np.float32)
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    np.testing.assert_allclose(parts(params, tokens, mask), whole(params, tokens, mask), rtol=1e-6)
