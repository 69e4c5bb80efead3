"""Equal bytes of caches, and the tables of the study's three parts."""

import contextlib

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import frontier as configs
from experiments import frontier
from experiments._fit import hidden_of
from experiments._recall import model_and_cache, recall_model
from experiments._study import Study
from memcache_jax.nn import LanguageModel


@pytest.fixture
def config(tmp_path):
    """Two models of one small layer, two updates each."""
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"{i} apples and {i} pears are {2 * i} fruits. " * 9)
    config = configs.get_config()
    four = config.changes["4 keys"]
    attention = config.changes["attention"]
    with config.unlocked():
        half = {"cache": {"cache_dtype": "bfloat16"}, "segmentation": {"name": "Constant"}}
        config.changes = ConfigDict({"four keys": four, "attention": attention, "half": half})
        config.text.changes = ConfigDict({"attention": {"mixers": ("attention",)}})
    config.update(
        parts=frontier.PARTS,
        steps=2,
        seeds=(0, 1),
        at_once=2,
        workers=1,
        batch_size=2,
        test_examples=4,
    )
    config.update(vocab_size=40, train=((16, 2, 0),), test=((32, 4),), target="32/4", widths=(16,))
    config.update(num_layers=1, head_dim=8, segment=8, warmup_steps=1)
    small = dict(num_layers=1, head_dim=8, segment=8, width=16, steps=2, batch_size=2, workers=1)
    config.needles.update(small | dict(test_examples=3, seeds=(0,), train=(16,), lengths=(32, 48)))
    text, training = config.text, config.text.training
    text.update(seeds=(0,), first_bin=16, eval_length=64, eval_tokens=200, eval_batch_size=2)
    text.first.segmentation.size = 8
    training.update(steps=2, batch_size=2, sequence_length=16)
    training.model.update(num_layers=1, features=16, num_heads=1, mlp_features=0)
    training.data.update(files=(str(tmp_path / "*.txt"),), exclude=(), heldout_fraction=0.3)
    training.optimizer.warmup_steps = 1
    return config


def models(config, length=64):
    whole = recall_model(config, "ssd_grm", 16, 40)
    return frontier.models_in(whole, config.changes, config.unbounded, length)


@pytest.mark.slow
def test_segments_of_the_smallest_size_that_fits(config):
    made = models(config)
    assert {name: model["segmentation"]["size"] for name, model in made.items()} == {
        "whole": 8,
        "four keys": 12,  # 64 numbers of state and 32 of keys in place of 8
        "attention": 1,
        "half": 5,  # 64 numbers of state in half the bytes, 8 of keys
    }
    assert made["half"]["cache"] == {"cache_dtype": "bfloat16"}
    most = frontier._bytes(made["whole"], 64)
    four = made["four keys"]
    assert frontier._bytes(four, 64) <= most < frontier._bytes(made["attention"], 64)
    assert frontier._bytes(made["half"], 64) <= most
    less = four | dict(segmentation={"name": "Constant", "size": 8})
    assert frontier._bytes(less, 64) > most

    config.unbounded = ()
    with pytest.raises(ValueError, match=r"attention takes [0-9,]+ bytes at 64 tokens"):
        models(config)


@pytest.mark.slow
def test_models_with_a_cache_are_tested_as_streams(config):
    """Float32 caches match one pass; narrower ones round cached states, not the live memory."""
    model = LanguageModel(model_and_cache(models(config)["whole"])[0], rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 40)
    one_pass = hidden_of(model, tokens, None)
    exact = hidden_of(model, tokens, {"cache_dtype": "float32"})
    rounded = hidden_of(model, tokens, {"cache_dtype": "int8"})
    np.testing.assert_allclose(exact, one_pass, atol=1e-5)
    np.testing.assert_allclose(rounded[:, :8], one_pass[:, :8], atol=1e-5)
    assert 1e-3 < np.abs(rounded - one_pass)[:, 8:].max() < 0.5
    short = jax.eval_shape(lambda: hidden_of(model, tokens[:, :5], {"cache_dtype": "int8"}))
    assert short.shape == one_pass[:, :5].shape  # within the first segment


def recall_of(cases):
    """What training would return: more for more keys, seeds and steps."""
    rows = []
    for case in cases:
        share = dict(whole=0.4, attention=0.9).get(case["name"], 0.6)
        share += 0.02 * case["seed"] - (0.1 if case["task"]["steps"] < 2 else 0) * (share < 0.9)
        rows.append(dict(accuracy={"32/4": share}, state_bytes={"32": 1000}, loss=0.0))
    return rows


@pytest.mark.slow
def test_the_program(config, tmp_path, monkeypatch):
    """Its tables, of results that are made up: what measures them has its own tests."""
    trained = []

    def needles_of(cases):
        return [dict(accuracy=[[0.5, 1.0], [0.25, 0.5]]) for _ in cases]

    def text_of(cases, folder, part):
        assert "cache" not in cases[0]["training"]["model"]
        assert (cases[0]["cache"] is None) == (cases[0]["name"] != "half")
        trained.append((folder.name, cases[0]["training"]["model"]["segmentation"]))
        return [dict(bins=[(0, 16, 3.0), (16, 64, 2.5)])]

    monkeypatch.setattr(frontier, "measure_recall", recall_of)
    monkeypatch.setattr(frontier.needle, "measure_light", needles_of)
    monkeypatch.setattr(frontier.extrapolate, "measure", text_of)
    with contextlib.closing(Study(tmp_path, config)) as study:
        frontier.program(config, study)
    recall, needles, text = (
        [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in (tmp_path / f"{part}.md").read_text().splitlines()[2:]
        ]
        for part in frontier.PARTS
    )
    assert recall == [
        ["ssd_grm", "0.410 ± 0.010", "0.00", "+0.100", "no", "1,000"],
        ["attention", "0.910 ± 0.010", "1.00", "+0.000", "yes", "1,000"],
        ["four keys", "0.610 ± 0.010", "0.40", "+0.100", "no", "1,000"],
        ["half", "0.610 ± 0.010", "0.40", "+0.100", "no", "1,000"],
    ]
    assert [row[1:] for row in needles] == [["0.750", "0.375"]] * 4
    assert [row[1:] for row in text] == [["3.000", "2.500"]] * 4
    # Segments of text's own bytes; attention has none of its segments.
    assert [name for name, _ in trained] == ["whole_0", "attention_0", "four_keys_0", "half_0"]
    assert trained[2][1]["size"] > trained[0][1]["size"] == 8
    assert (tmp_path / "frontier.png").stat().st_size > 5000

    config.parts = ("nothing",)
    with pytest.raises(ValueError, match="parts must be of recall, needles, text, got nothing"):
        frontier.program(config, study)
