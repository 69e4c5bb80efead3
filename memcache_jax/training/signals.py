"""Signals that stop a run after a checkpoint."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax


class StoppedError(Exception):
    """A signal stopped the run, after a checkpoint was saved."""

    def __init__(self, step: int, signal_number: int, resumes: bool = False) -> None:
        command = "The same command" + ("" if resumes else " with --config.resume=True")
        super().__init__(
            f"{signal.Signals(signal_number).name}: stopped after step {step}, with a checkpoint. "
            f"{command} resumes from there."
        )
        self.step, self.signal_number = step, signal_number


class StopSignal:
    """Stores the number of the first SIGINT or SIGTERM; a second one acts at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        # Python lets only the main thread handle signals; other threads leave them alone.
        # With several processes, JAX handles SIGTERM for all of them: see ``should_stop``.
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.__exit__()
        # Not through a stream, whose lock the interrupted code may hold.
        os.write(2, b"\nStopping with a checkpoint; a second signal stops at once.\n")
