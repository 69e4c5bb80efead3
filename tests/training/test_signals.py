"""A run that gets a signal saves and stops."""

import contextlib
import signal

import pytest

from memcache_jax.training import StoppedError, loop, train
from memcache_jax.training.checkpoint import Checkpoints
from tests.training.runs import assert_same_params, rows


@pytest.mark.slow
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


@pytest.mark.slow
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
