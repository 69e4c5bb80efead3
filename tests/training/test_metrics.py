"""Metrics: the file across a resume, the progress line, the curve."""

import json
import sys

import pytest

from memcache_jax.training import metrics as module
from memcache_jax.training.metrics import MetricsWriter, Progress, plot_curve, read_metrics


def write(folder, steps, **options):
    writer = MetricsWriter(folder, **options)
    for step in steps:
        writer.write(step, {"loss": step / 3})
    writer.close()


def test_rows_come_back_exactly(tmp_path):
    write(tmp_path, [2, 4])
    assert read_metrics(tmp_path) == [{"step": 2, "loss": 2 / 3}, {"step": 4, "loss": 4 / 3}]


def test_rows_are_on_disk_before_close(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()


def test_going_on_drops_the_steps_that_come_again(tmp_path):
    write(tmp_path, [2, 4, 6, 8])
    write(tmp_path, [6, 8, 10], step=5)
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4, 6, 8, 10]


def test_starting_anew_empties_the_file(tmp_path):
    write(tmp_path, [2, 4])
    write(tmp_path, [1])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_line_cut_short_is_dropped(tmp_path):
    write(tmp_path, [2, 4])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [row["step"] for row in read_metrics(tmp_path)] == [2]
    write(tmp_path, [4], step=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    write(tmp_path, [1, 2], tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_tensorboard_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="pip install tensorboardX"):
        MetricsWriter(tmp_path, tensorboard=True)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_progress_line(clock, capsys):
    progress = Progress(steps=600, tokens_per_step=4096)
    clock.now = 60.0  # the first step compiles
    progress.start(1)
    clock.now += 119 * 1.25
    assert progress.update(120, 2.0131) == pytest.approx(4096 / 1.25)
    assert capsys.readouterr().out == "step 120/600  loss 2.013  3.28k tok/s  10:00 left\n"


def test_pauses_do_not_count_as_training(clock):
    progress = Progress(steps=10, tokens_per_step=100)
    progress.start(1)
    clock.now += 2.0
    with progress.pause():
        clock.now += 50.0
    assert progress.update(3, 1.0) == pytest.approx(100.0)


def test_a_terminal_has_one_line(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress(steps=4, tokens_per_step=100)
    for step in (1, 2):
        clock.now += 1.0
        progress.update(step, 1.0)
    line = "\rstep 2/4  loss 1.000  100 tok/s  00:02 left"
    assert capsys.readouterr().out.endswith(line)
    progress.note("held-out: 1.000")
    progress.close()
    out = capsys.readouterr().out
    assert out.startswith("\r")
    assert out.endswith(f"\rheld-out: 1.000\n{line}{line}\n")


def test_a_silent_process_prints_nothing(clock, capsys):
    progress = Progress(steps=4, tokens_per_step=100, show=False)
    progress.start(1)
    clock.now += 1.0
    assert progress.update(2, 1.0) == pytest.approx(100.0)
    progress.note("held-out: 1.000")
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("bytes_per_token", [None, 1.0])
def test_curve_is_drawn(tmp_path, bytes_per_token):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 2.0})
    writer.write(2, {"loss": 1.0, "heldout_loss": 1.5})
    writer.close()
    path = plot_curve(tmp_path, title="demo", bytes_per_token=bytes_per_token)
    assert path.read_bytes().startswith(b"\x89PNG")
