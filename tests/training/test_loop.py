"""The loop: what a run leaves behind, how it goes on, what it refuses, how it stops."""

import contextlib
import json
import logging
import signal
from unittest import mock

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from memcache_jax.training import StoppedError, loop, train
from memcache_jax.training.checkpoint import Checkpoints
from memcache_jax.training.metrics import read_metrics
from memcache_jax.training.workdir import lock_workdir

# Orbax reads shardings from a file where the reader gives none.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def rows(workdir):
    """The metrics without those that a clock decides."""
    return [
        {key: value for key, value in row.items() if key != "tokens_per_second"}
        for row in read_metrics(workdir)
    ]


def assert_same_params(first, second):
    jax.tree.map(
        np.testing.assert_array_equal,
        ocp.load(str(first / "params")),
        ocp.load(str(second / "params")),
    )


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


def test_a_run_leaves_everything_behind(config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "memcache_jax")
    config.sample.max_new_tokens = 5
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


def test_more_steps_go_on_and_the_new_schedule_is_told(config, tmp_path, caplog):
    train(config, tmp_path)
    caplog.set_level(logging.INFO, "memcache_jax")
    config.steps, config.resume = 8, True
    results = train(config, tmp_path)
    assert results["step"] == 8
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8]
    assert "steps was 6 and is 8" in caplog.text
    assert "the new schedule" in caplog.text


def test_a_signal_saves_and_stops(config, tmp_path, monkeypatch):
    make = loop.make_train_step

    def make_interrupted(*args):
        train_step, calls = make(*args), []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) == 5:
                signal.raise_signal(signal.SIGTERM)
            return train_step(*arguments)

        return interrupted

    handler = signal.getsignal(signal.SIGTERM)
    train(config, tmp_path / "whole")
    monkeypatch.setattr(loop, "make_train_step", make_interrupted)
    with pytest.raises(
        StoppedError, match=r"after step 5, with a checkpoint.*resume=True"
    ) as error:
        train(config, tmp_path / "parts")
    assert error.value.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert Checkpoints.steps_in(tmp_path / "parts") == [5, 3]
    monkeypatch.undo()
    config.resume = True
    train(config, tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert_same_params(tmp_path / "parts", tmp_path / "whole")


def test_a_signal_after_the_last_look_for_one_is_not_lost(config, tmp_path, monkeypatch):
    class Interrupting(loop.Progress):
        pauses = 0

        @contextlib.contextmanager
        def pause(self):
            with super().pause():
                yield
            self.pauses += 1
            if self.pauses == 5:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "Progress", Interrupting)
    with pytest.raises(StoppedError, match="after step 5, with a checkpoint"):
        train(config, tmp_path)
    assert Checkpoints.steps_in(tmp_path)[0] == 5


@pytest.mark.parametrize("left", ["params", "results.json"])
def test_what_a_finished_run_left_is_not_replaced(config, tmp_path, left):
    workdir = tmp_path / "run"
    (workdir / left).mkdir(parents=True)
    config.resume = True
    with pytest.raises(ValueError, match=f"holds {left} of a finished run without its checkpoints"):
        train(config, workdir)
    assert [path.name for path in workdir.iterdir()] == [left]


def test_a_workdir_that_another_run_writes_to(config, tmp_path):
    config.resume = True
    with lock_workdir(tmp_path), pytest.raises(ValueError, match="another run is writing to"):
        train(config, tmp_path)
    train(config, tmp_path)


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


def test_a_workdir_with_a_run_is_not_overwritten(config, tmp_path):
    train(config, tmp_path)
    before = (tmp_path / "config.json").read_text()
    config.seed = 5
    with pytest.raises(ValueError, match=r"a checkpoint of step 6: .*--config.resume=True, or"):
        train(config, tmp_path)
    config.resume, config.model.features, config.data.streams = True, 32, 2
    with pytest.raises(
        ValueError, match=r"data.streams: 1, now 2; model.features: 16, now 32; seed"
    ):
        train(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    assert Checkpoints.steps_in(tmp_path) == [6, 3]


def test_changed_files_are_told(config, corpus_folder, tmp_path):
    train(config, tmp_path / "run")
    (corpus_folder / "new.txt").write_text("One file more. " * 9)
    config.resume = True
    with pytest.raises(ValueError, match=r"the data .* has changed.*'train_files': "):
        train(config, tmp_path / "run")


def test_an_empty_folder_is_told(config, tmp_path):
    (tmp_path / "empty").mkdir()
    config.data.files = (str(tmp_path / "empty"),)
    with pytest.raises(ValueError, match=r"found no files: .*empty' is an empty folder"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_files_are_told(config, tmp_path):
    config.data.files = ()
    with pytest.raises(ValueError, match=r"data.files names no files: set --config.data.files="):
        train(config, tmp_path / "run")


@pytest.fixture
def word_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"</s>": 0, "?": 1, "apples": 2, "pears": 3, "and": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path


def test_text_that_is_not_utf8_is_counted(config, corpus_folder, tmp_path, word_tokenizer, caplog):
    for file in corpus_folder.iterdir():
        file.write_bytes(file.read_bytes() + b"\xff")
    config.data.tokenizer, config.model.vocab_size = str(word_tokenizer), 5
    train(config, tmp_path / "run")
    assert (
        "documents read by this process were not UTF-8; their invalid bytes were replaced"
        in caplog.text
    )
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == word_tokenizer.read_bytes()


def test_bytes_that_are_not_utf8_are_fine(config, corpus_folder, tmp_path, caplog):
    for file in corpus_folder.iterdir():
        file.write_bytes(file.read_bytes() + b"\xff\xfe")
    train(config, tmp_path / "run")
    assert "UTF-8" not in caplog.text


def test_a_tokenizer_with_too_many_ids_is_told(config, tmp_path, word_tokenizer):
    config.data.tokenizer, config.model.vocab_size = str(word_tokenizer), 4
    with pytest.raises(ValueError, match="has 5 ids, but the model's vocab_size is 4"):
        train(config, tmp_path / "run")


def test_jsonl_with_a_named_field(config, tmp_path):
    for i in range(4):
        lines = [json.dumps({"body": f"{i} apples, {j} pears. " * 9}) for j in range(5)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))
    config.data.files = (str(tmp_path / "*.jsonl"),)
    config.data.text_field = "body"
    assert train(config, tmp_path / "run")["step"] == 6


def test_offloading_needs_devices_that_see_the_host(config, tmp_path, monkeypatch):
    config.model.update(remat=True, offload_states=True)
    device = mock.Mock(platform="toy", addressable_memories=lambda: [mock.Mock(kind="device")])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(ValueError, match=r"host's memory \(pinned_host\), got toy with device"):
        train(config, tmp_path)
