"""The step: its loss, what decays, how the state is made, what an evaluation counts."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

import memcache_jax as mc
from memcache_jax.training.data import HeldOut
from memcache_jax.training.optimizer import make_optimizer, make_schedule
from memcache_jax.training.step import (
    abstract_state,
    create_state,
    evaluate,
    make_eval_step,
    make_train_step,
)

OPTIONS: Any = ConfigDict(
    dict(
        learning_rate=0.1,
        warmup_steps=3,
        final_fraction=0.1,
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
        clip_norm=1.0,
    )
)


def options(**changes) -> Any:
    return ConfigDict({**OPTIONS, **changes})


def attention(**changes):
    config = mc.nn.LanguageModelConfig(
        vocab_size=11,
        num_layers=1,
        features=8,
        num_heads=2,
        mixers=(mc.nn.AttentionMixer(),),
        mlp_features=8,
    )
    return dataclasses.replace(config, **changes)


def titans():
    mixer = mc.nn.MemoryCachingMixer(mc.memories.Titans(4, 2), mc.GRM(), mc.Constant(8))
    return attention(num_layers=2, mixers=(mixer,))


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 10)), jnp.int32)


def names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def test_schedule_rises_and_falls():
    rate = np.asarray(jax.vmap(make_schedule(OPTIONS, 20))(jnp.arange(20)))
    np.testing.assert_allclose(rate[:4], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    assert np.all(np.diff(rate[3:]) < 0)
    np.testing.assert_allclose(rate[-1], 0.01, rtol=1e-5)


def test_schedule_without_warmup_starts_at_the_peak():
    assert make_schedule(options(warmup_steps=0), 5)(0) == pytest.approx(0.1)


def test_warmup_must_end_before_the_last_step():
    with pytest.raises(
        ValueError, match=r"warmup_steps must be in \[0, steps\), got 5 for steps=5"
    ):
        make_optimizer(options(warmup_steps=5), 5)


def test_optimizers_go_by_their_names():
    lion = make_optimizer(options(name="lion", arguments=dict(mu_dtype="bfloat16")), 10)
    state: Any = lion.init({"kernel": jnp.ones(3)})
    assert state[1][0].mu["kernel"].dtype == jnp.bfloat16
    sgd = make_optimizer(options(name="sgd", warmup_steps=0), 10)
    params = {"kernel": jnp.ones(3)}
    updates: Any = sgd.update({"kernel": jnp.full(3, 0.1)}, sgd.init(params), params)[0]
    np.testing.assert_allclose(updates["kernel"], -0.01, rtol=1e-6)  # no decay


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamq"}, "must be an optimizer of optax, such as adamw or lion, got 'adamq'"),
        ({"name": "EmptyState"}, "must be an optimizer of optax"),
        ({"arguments": {"momentum": 0.9}}, r"must be of optax.adamw: .*; got \['momentum'\]"),
    ],
)
def test_unknown_optimizers_and_arguments_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(options(**changes), 10)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_only_matrices_decay(name):
    optimizer = make_optimizer(options(name=name), 10)
    _, target = abstract_state(titans(), optimizer)
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), target.params)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zero, jax.jit(optimizer.init)(params), params)
    decayed = {name for name, update in names(updates).items() if np.any(update)}
    block, projections = (
        "layers/blocks/0",
        ("query", "key", "value", "connector", "output_gate", "out"),
    )
    expected = {"embedding/embedding", "head/kernel"}
    expected |= {f"{block}/mixer/{name}/kernel" for name in projections}
    expected |= {f"{block}/mlp/{name}/kernel" for name in ("gate", "up", "down")}
    expected |= {f"{block}/mixer/controls/{name}/kernel" for name in mc.memories.Titans(4).controls}
    assert decayed == expected


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


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
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
