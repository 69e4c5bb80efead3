"""The loop: what a run leaves behind, how it goes on, what ends it."""

import json
import logging
from unittest import mock

import jax
import pytest

from memcache_jax.training import loop, train
from memcache_jax.training.checkpoint import Checkpoints
from tests.training.runs import assert_same_params, rows


class StopError(Exception):
    """Stands for a kill: nothing is saved on the way out."""


@pytest.fixture
def stop_before(monkeypatch):
    """Lets a run die before a step."""

    def arrange(step):
        make = loop.make_train_step

        def make_mortal(*args):
            train_step, calls = make(*args), []

            def mortal(*arguments):
                calls.append(1)
                if len(calls) == step:
                    raise StopError
                return train_step(*arguments)

            return mortal

        monkeypatch.setattr(loop, "make_train_step", make_mortal)

    return arrange


@pytest.mark.slow
def test_a_run_leaves_everything_behind(config, tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO, "memcache_jax")
    config.sample.max_new_tokens, config.sample.every = 5, 4
    config.sample.prompt = "3 app"
    results = train(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "params",
        "results.json",
        "sample.txt",
    }
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("3 app")
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 4, 6]
    assert results["step"] == 6
    assert results["tokens"] == 6 * 2 * 32
    assert results["heldout_loss"] == rows(tmp_path / "run")[-1]["heldout_loss"]
    assert Checkpoints.steps_in(tmp_path / "run") == [6, 3]
    assert "files to train on" in caplog.text
    shown = "".join(capfd.readouterr())
    assert "step 4/6  sample:\n3 app" in shown
    assert shown.count("sample:") == 1


@pytest.mark.slow
def test_a_run_that_died_goes_on_bit_for_bit(config, tmp_path, stop_before, monkeypatch):
    # Lines come every 2 steps and checkpoints every 3, so that a line's mean spans the restart.
    train(config, tmp_path / "whole")
    stop_before(6)
    with pytest.raises(StopError):
        train(config, tmp_path / "parts")
    monkeypatch.undo()
    assert Checkpoints.steps_in(tmp_path / "parts") == [3]
    config.resume = True
    train(config, tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert_same_params(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_no_step_before_the_last_checkpoint_is_on_disk(config, tmp_path, monkeypatch):
    config.checkpoint_every, config.steps = 2, 6
    make, on_disk = loop.make_train_step, []

    def make_watched(*args):
        train_step = make(*args)

        def watched(*arguments):
            on_disk.append(max(Checkpoints.steps_in(tmp_path), default=0))
            return train_step(*arguments)

        return watched

    monkeypatch.setattr(loop, "make_train_step", make_watched)
    train(config, tmp_path)
    assert on_disk == [0, 0, 2, 2, 4, 4]


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint_starts_anew(
    config, tmp_path, stop_before, monkeypatch
):
    config.resume = True
    stop_before(3)
    with pytest.raises(StopError):
        train(config, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [2]
    monkeypatch.undo()
    train(config, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6]


@pytest.mark.slow
def test_a_complete_run_prints_its_results_again(config, tmp_path, caplog, monkeypatch):
    results = train(config, tmp_path)
    caplog.set_level(logging.INFO, "memcache_jax")
    config.resume = True
    monkeypatch.setattr(loop, "make_train_step", None)
    assert train(config, tmp_path) == results
    assert "is complete, at step 6" in caplog.text
    # A kill while the last files were written leaves no results.
    (tmp_path / "results.json").unlink()
    assert train(config, tmp_path) == results


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch):
    make = loop.make_train_step

    def make_exploding(*args):
        train_step, calls = make(*args), []

        def exploding(state, tokens):
            calls.append(1)
            state, metrics = train_step(state, tokens)
            if len(calls) == 5:
                metrics = metrics | {"loss": metrics["loss"] * float("nan")}
            return state, metrics

        return exploding

    monkeypatch.setattr(loop, "make_train_step", make_exploding)
    config.checkpoint_every, config.log_every = 2, 100
    with pytest.raises(FloatingPointError, match=r"step 5 is no longer finite.*step 4 is good"):
        train(config, tmp_path)
    assert Checkpoints.steps_in(tmp_path) == [4, 2]


def test_offloading_needs_devices_that_see_the_host(config, tmp_path, monkeypatch):
    config.model.update(remat=True, offload_states=True)
    device = mock.Mock(platform="toy", addressable_memories=lambda: [mock.Mock(kind="device")])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(ValueError, match=r"host's memory \(pinned_host\), got toy with device"):
        train(config, tmp_path)
