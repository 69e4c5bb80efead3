"""Loss by position: the same loss as an evaluation's, and what caches change after the training."""

import contextlib
import math

import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from configs import extrapolate as configs
from experiments import extrapolate
from experiments._study import Study
from memcache_jax.training.data import HeldOut
from memcache_jax.training.step import evaluate, make_eval_step
from tests.training.test_pretrained import flip_a_bit, public_folder


def test_bins():
    assert extrapolate.bin_edges(100, 16) == [(0, 16), (16, 32), (32, 64), (64, 100)]
    assert extrapolate.bin_edges(64, 32) == [(0, 32), (32, 64)]
    assert extrapolate.bin_edges(8, 32) == [(0, 8)]


@pytest.mark.slow
def test_the_mean_over_positions_is_the_loss_of_an_evaluation():
    config = mc.nn.LanguageModelConfig(
        vocab_size=19, num_layers=1, features=8, num_heads=1, mixers=(mc.nn.AttentionMixer(),)
    )
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 19, (3, 13)).astype(np.int32)
    losses = extrapolate.loss_by_position(model, tokens, 2)
    assert losses.shape == (3, 12)
    graph, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    measured = evaluate(make_eval_step(graph), params, HeldOut(tokens, 1.0), 2)
    np.testing.assert_allclose(losses.mean(), measured["heldout_loss"], rtol=1e-6)
    # Position t depends on the tokens up to the next one alone.
    changed = tokens.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % 19
    others = extrapolate.loss_by_position(model, changed, 3)
    np.testing.assert_allclose(others[:, :6], losses[:, :6], rtol=1e-5)
    assert np.abs(others[:, 6:] - losses[:, 6:]).min() > 0


@pytest.fixture
def config(tmp_path):
    """A rule and attention, three updates on rows of 16 tokens."""
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"{i} apples and {i} pears are {2 * i} fruits. " * 9)
    config = configs.get_config("cpu")
    config.models, config.base = ("dla", "transformer"), "dla"
    config.memory.update(chunk_size=8, expansion=1)
    config.segment, config.first_bin = 8, 16
    config.eval_length, config.eval_tokens, config.eval_batch_size = 64, 200, 2
    training = config.training
    training.steps, training.batch_size, training.sequence_length = 3, 2, 16
    training.model.update(num_layers=1, features=16, num_heads=1, mlp_features=0)
    training.data.files, training.data.exclude = (str(tmp_path / "*.txt"),), ()
    training.data.heldout_fraction, training.optimizer.warmup_steps = 0.3, 1
    return config


@pytest.mark.slow
def test_caches_after_the_training_change_what_comes_after_its_length(config, tmp_path):
    with contextlib.closing(Study(tmp_path / "study", config)) as study:
        extrapolate.program(config, study)
        groups = extrapolate.groups(config)
        rows = study.measure(groups, lambda cases: pytest.fail("measured again"))
    assert [row["name"] for row in rows] == [
        "dla",
        "dla, GRM after training",
        "dla, soup after training",
        "transformer",
    ]
    base, grm, soup, _ = (np.array(row["bins"]) for row in rows)
    assert base[:, :2].tolist() == [[0, 16], [16, 32], [32, 64]]
    for other in (grm, soup):
        assert math.isclose(other[0, 2], base[0, 2], abs_tol=1e-4)
        assert np.all(other[1:, 2] != base[1:, 2])
    assert np.all(soup[1:, 2] != grm[1:, 2])
    assert rows[0]["rows"] == 3
    assert (tmp_path / "study" / "models" / "dla" / "params").is_dir()
    assert (tmp_path / "study" / "extrapolate.png").stat().st_size > 1000
    assert "| dla, GRM after training" in (tmp_path / "study" / "table.md").read_text()


@pytest.mark.slow
def test_a_public_model_as_it_is_and_with_caches(config, tmp_path):
    folder = public_folder(tmp_path / "public", "mamba2")
    for i in range(8):  # of words that its tokenizer has
        words = " ".join(f"w{(i * j * j + 3 * j) % 96 + 1}" for j in range(150))
        (tmp_path / f"{i}.txt").write_text(words)
    with contextlib.closing(Study(tmp_path / "study", config)) as study:
        cases = extrapolate.public_group(config, str(folder), 16)
        extrapolate.program(config, study, [cases])
        rows = study.measure([cases], lambda cases: pytest.fail("measured again"))
    assert [row["name"] for row in rows] == [
        "public",
        "public, GRM after training",
        "public, soup after training",
    ]
    base, grm, soup = (np.array(row["bins"]) for row in rows)
    assert base[:, :2].tolist() == [[0, 16], [16, 32], [32, 64]]
    for other in (grm, soup):
        assert math.isclose(other[0, 2], base[0, 2], abs_tol=1e-4)
        assert np.all(other[1:, 2] != base[1:, 2])
    assert len(extrapolate.public_group(config, str(folder), None)) == 1


def test_a_changed_public_model_is_another_case(config, tmp_path):
    folder = public_folder(tmp_path / "public", "mamba2")
    cases = extrapolate.public_group(config, str(folder), 16)
    assert cases == extrapolate.public_group(config, str(folder), 16)
    for name in ("model.safetensors", "tokenizer.json"):
        flip_a_bit(folder / name)
        before, cases = cases, extrapolate.public_group(config, str(folder), 16)
        assert not any(case in before for case in cases)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(eval_length=16), "eval_length must be above the training's 16, got 16"),
        (dict(first_bin=0), "first_bin must be at least 1, got 0"),
    ],
)
def test_errors(config, changes, message):
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        extrapolate.groups(config)
