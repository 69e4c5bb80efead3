"""A workdir with a run: what is refused, and what is told."""

import logging

import pytest

from memcache_jax.training import train
from memcache_jax.training.checkpoint import Checkpoints
from memcache_jax.training.workdir import lock_workdir
from tests.training.runs import rows


@pytest.mark.slow
def test_more_steps_go_on_and_the_new_schedule_is_told(config, tmp_path, caplog):
    train(config, tmp_path)
    caplog.set_level(logging.INFO, "memcache_jax")
    config.steps, config.resume = 8, True
    results = train(config, tmp_path)
    assert results["step"] == 8
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8]
    assert "steps was 6 and is 8" in caplog.text
    assert "the new schedule" in caplog.text


@pytest.mark.parametrize("left", ["params", "results.json"])
def test_what_a_finished_run_left_is_not_replaced(config, tmp_path, left):
    workdir = tmp_path / "run"
    (workdir / left).mkdir(parents=True)
    config.resume = True
    with pytest.raises(ValueError, match=f"holds {left} of a finished run without its checkpoints"):
        train(config, workdir)
    assert [path.name for path in workdir.iterdir()] == [left]


@pytest.mark.slow
def test_a_workdir_that_another_run_writes_to(config, tmp_path):
    config.resume = True
    with lock_workdir(tmp_path), pytest.raises(ValueError, match="another run is writing to"):
        train(config, tmp_path)
    train(config, tmp_path)


@pytest.mark.slow
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


@pytest.mark.slow
def test_changed_files_are_told(config, corpus_folder, tmp_path):
    train(config, tmp_path / "run")
    (corpus_folder / "new.txt").write_text("One file more. " * 9)
    config.resume = True
    with pytest.raises(ValueError, match=r"the data .* has changed.*'train_files': "):
        train(config, tmp_path / "run")
