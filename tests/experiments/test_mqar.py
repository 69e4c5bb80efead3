"""Associative recall: Zoology's rows, the same law on a device, and models that learn it."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments._fit import Questions, Recipe, Replica, fit
from experiments._mqar import on_device, zoology
from experiments._recall import recall_config, recall_groups, recall_model
from experiments._study import Study
from memcache_jax.nn import AttentionMixer, LanguageModelConfig

REFERENCE = np.load(Path(__file__).parents[1] / "data" / "mqar_reference.npz")
CASES = {
    name: case
    for name, case in json.loads(str(REFERENCE["meta_json"]))["cases"].items()
    if "error" not in case
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_zoology(name):
    case = CASES[name]
    questions = zoology(
        case["input_seq_len"],
        case["num_kv_pairs"],
        vocab_size=case["vocab_size"],
        examples=case["num_examples"],
        seed=case["seed"],
        power=case["power_a"],
        random_tokens=False,
    )
    labels = np.full(questions.tokens.shape, -100)
    np.put_along_axis(labels, questions.places, questions.answers, axis=1)
    np.testing.assert_array_equal(labels, REFERENCE[f"{name}__labels"])
    inputs = REFERENCE[f"{name}__inputs"]
    if case["random_non_queries"]:  # torch's random numbers
        inputs = np.where(questions.tokens == 0, 0, inputs)
    np.testing.assert_array_equal(questions.tokens, inputs)


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_rows_on_the_device_have_the_same_law(power):
    sizes: dict[str, Any] = dict(vocab_size=70, power=power, random_tokens=False)
    source = jax.jit(jax.vmap(on_device(32, 4, **sizes)))
    drawn = source(jax.random.split(jax.random.key(0), 4000))
    wanted = zoology(32, 4, examples=4000, seed=0, **sizes)
    for mine in (jax.tree.map(np.asarray, drawn), wanted):
        keys = mine.tokens[:, 0:8:2]
        np.testing.assert_array_equal(mine.answers, mine.tokens[:, 1:8:2])
        np.testing.assert_array_equal(np.take_along_axis(mine.tokens, mine.places, 1), keys)
        assert all(len(set(row)) == 4 for row in keys)
        assert keys.min() >= 1
        assert keys.max() < 35 <= mine.answers.min()
        assert mine.answers.max() < 70

    def frequencies(x, bins):
        return np.bincount(np.asarray(x).reshape(-1), minlength=bins) / x.size

    for name, bins in (("places", 32), ("tokens", 70)):
        mine, theirs = (frequencies(getattr(q, name), bins) for q in (drawn, wanted))
        np.testing.assert_allclose(mine, theirs, atol=0.012)


@pytest.mark.parametrize(
    "sizes", [(31, 4, 64), (32, 9, 64), (32, 0, 64), (32, 4, 32), (64, 40, 66)]
)
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match=r"a row needs|different keys"):
        zoology(sizes[0], sizes[1], vocab_size=sizes[2], examples=1, seed=0)


def tiny_model():
    return LanguageModelConfig(
        vocab_size=8,
        num_layers=1,
        features=16,
        num_heads=1,
        mixers=(AttentionMixer(),),
        mlp_features=0,
    )


def copying(key):
    """The answer is the token itself."""
    tokens = jax.random.randint(key, (6,), 0, 8)
    return Questions(tokens, np.array([1, 4]), tokens[np.array([1, 4])])


@pytest.mark.slow
def test_replicas_are_trained_as_if_alone():
    recipe = Recipe(steps=4, batch_size=4, warmup_steps=1, examples=(5,))
    replicas = [Replica(0, 1e-2), Replica(1, 3e-2)]
    together = fit(tiny_model(), [copying], replicas, recipe)
    for i, replica in enumerate(replicas):
        alone = fit(tiny_model(), [copying], [replica], recipe)
        np.testing.assert_allclose(together.losses[i], alone.losses[0], rtol=1e-5)
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y[0], atol=2e-5),
            together.params,
            alone.params,
        )


@pytest.mark.slow
def test_a_model_learns_and_answers():
    recipe = Recipe(steps=150, batch_size=16, warmup_steps=5)
    fitted = fit(tiny_model(), [copying], [Replica(0, 2e-2), Replica(0, 1e30)], recipe)
    questions = jax.vmap(copying)(jax.random.split(jax.random.key(5), 10))
    right = fitted.answers(jax.tree.map(np.asarray, questions), batch_size=4)
    assert right.shape == (2, 10, 2)
    assert right[0].all()
    assert not np.isfinite(fitted.losses[1]) or fitted.losses[1] > 1


@pytest.mark.slow
def test_the_programs(tmp_path):
    from experiments import ablate, mqar

    config = recall_config()
    config.models, config.seeds = ("ssd", "ssd_grm"), (0, 1)
    config.train, config.test = ((16, 2, 0),), ((16, 2), (32, 4))
    config.vocab_size, config.head_dim, config.segment = 40, 4, 4
    config.steps, config.batch_size, config.test_examples = 2, 2, 3
    config.at_once = 2
    study = Study(tmp_path, config)
    mqar.program(config, study)
    assert (tmp_path / "mqar.png").stat().st_size > 5000
    table = (tmp_path / "table.md").read_text()
    assert table.count("±") == 4
    with config.unlocked():
        config.changes = {"no gates": {"aggregation": {"name": "Residual"}}}
    config.models = ("ssd_grm",)
    ablate.program(config, study)
    assert (tmp_path / "ablate.png").stat().st_size > 5000
    study.close()
    with pytest.raises(ValueError, match="got gates"):
        ablate.changed(recall_model(config, "ssd", 64, 40), {"gates": 1})
    config.steps = 0
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        recall_groups(config, {})
