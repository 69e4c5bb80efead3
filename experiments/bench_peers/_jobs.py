"""Programs to time in a worker."""

import time
from collections.abc import Callable, Mapping
from typing import Any

Job = Callable[[], Any]


class Jobs:
    """Makes jobs, and runs them.

    Args:
      cases: functions of sizes that return a job, by name. A job computes an output and its
        gradients, and returns the output's shape.
      clock: a clock in seconds. The processor's time leaves out that of other processes.
    """

    def __init__(
        self,
        cases: Mapping[str, Callable[..., Job]],
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._cases, self._clock = cases, clock
        self._jobs: dict[str, Job] = {}

    def prepare(self, case: str, **sizes: int) -> list[int]:
        """Makes a job, runs it once, and returns its output's shape."""
        self._jobs[case] = self._cases[case](**sizes)
        return list(self._jobs[case]())

    def seconds(self, case: str) -> float:
        """Runs a job."""
        begin = self._clock()
        self._jobs[case]()
        return self._clock() - begin
