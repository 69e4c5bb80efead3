"""Models with new parameters: they begin as the old ones, and come back merged."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.tuning import merge_in_place
from tests.cases import assert_close
from tests.nn.test_lora import adapters
from tests.pretrained.test_read import FOLDERS, expected

run = jax.jit(lambda model, tokens: model(tokens))


@pytest.mark.slow
def test_a_model_is_trained_by_its_adapters_and_merged(tmp_path):
    tokens, wanted = expected("qwen3_5_text")
    base = mc.pretrained.load(FOLDERS / "qwen3_5_text")
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(base)))
    model = mc.nn.with_lora(base, rank=3, alpha=6.0, rngs=nnx.Rngs(0))
    assert base.config.lora is None
    assert_close(run(model, tokens), wanted, 2e-5)
    part = nnx.PathContains("low_rank")
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=part)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(tokens[:, :-1])
            labels = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return labels.mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, part))(model)
        optimizer.update(model, gradients)
        return value

    first = adapters(model)
    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    for path, value in adapters(model).items():
        assert (np.abs(value - first[path]).max(axis=(-2, -1)) > 0).all(), path
    trained = run(model, tokens)
    merged = mc.nn.merge_lora(model)
    assert merged.config == base.config
    assert not adapters(merged)
    assert_close(run(merged, tokens), trained, 2e-5)
    np.testing.assert_array_equal(run(model, tokens), trained)
    assert np.abs(run(merged, tokens) - wanted).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(base)), before)
    # Its own library's file has no place for adapters, but for the merged matrices.
    with pytest.raises(ValueError, match="merge_lora"):
        mc.pretrained.save(model, tmp_path / "saved")
    mc.pretrained.save(merged, tmp_path / "saved")
    assert_close(run(mc.pretrained.load(tmp_path / "saved"), tokens), run(merged, tokens), 1e-6)


@pytest.mark.usefixtures("unchecked")
def test_adapters_once():
    config = mc.nn.LanguageModelConfig(
        11, 2, features=8, num_heads=2, mixers=(mc.nn.AttentionMixer(),), mlp_features=0
    )
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    assert mc.nn.merge_lora(model) is model
    model = mc.nn.with_lora(model, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the model has adapters"):
        mc.nn.with_lora(model, rngs=nnx.Rngs(0))
    other: Any = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"model must be an mc\.nn\.LanguageModel, got"):
        mc.nn.merge_lora(other)


def test_adapters_are_merged_in_place_and_their_arrays_deleted():
    config = mc.nn.LanguageModelConfig(
        11, 2, features=8, num_heads=2, mixers=(mc.nn.AttentionMixer(),), lora=mc.nn.LoRA(2)
    )
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.PathContains("low_rank"))):
        param.set_value(jax.random.normal(jax.random.key(len(path)), param.shape))
    wanted = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(mc.nn.merge_lora(model))))
    before = {path: param[...] for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    merged = merge_in_place(model, delete=True)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(merged)), wanted)
    assert merged.config.lora is None
    deleted = {path for path, x in before.items() if x.is_deleted()}
    adapted = {path[: path.index("low_rank")] for path in before if "low_rank" in path}
    assert len(adapted) == 7
    assert deleted == {path for path in before if path[:-1] in adapted or "low_rank" in path}
