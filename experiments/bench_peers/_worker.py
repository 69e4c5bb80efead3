"""Processes in other environments that answer calls, in JSON, one on a line.

A worker imports nothing but the standard library until its module's first call.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments._memory import keep_freed_memory

_ROOT = Path(__file__).parents[2]


class WorkerError(RuntimeError):
    """What a worker raised, or how it ended."""


class Worker:
    """Calls the functions of a module in a process.

    Args:
      python: the interpreter.
      module: the module's name in this package.
      core: the CPU core that the process runs on, with one thread; None for all.
      environment: changes to this process's environment.
    """

    def __init__(
        self,
        python: str,
        module: str,
        core: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by close()
        own = dict(PYTHONPATH=str(_ROOT), **(environment or {}))
        if core is not None:
            own |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        self._process = subprocess.Popen(
            [python, "-m", __spec__.name, f"{__package__}.{module}", json.dumps(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            text=True,
            cwd=_ROOT,
            env={**os.environ, **own},
        )

    def call(self, function: str, *arguments: Any, **named: Any) -> Any:
        """Returns what a function returns.

        Raises:
          WorkerError: with its error, or the last line that the process told before it ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        try:
            stdin.write(json.dumps([function, arguments, named]) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise WorkerError(f"{self._module} ended, {self._last_words()}")
        result, error = json.loads(answer)
        if error:
            raise WorkerError(error)
        return result

    def _last_words(self) -> str:
        status = self._process.wait()
        self._told.seek(0)
        lines = self._told.read().split("\n")
        return f"status {status}: " + next((line for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a call that the process did not take
                    pipe.close()
        self._told.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(module: str, core: int | None) -> None:
    """Answers calls from the standard input; what others print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if core is not None:
        os.sched_setaffinity(0, {core})
        keep_freed_memory()
    for line in sys.stdin:
        function, arguments, named = json.loads(line)
        try:
            called = getattr(importlib.import_module(module), function)
            answer = called(*arguments, **named), None
        except Exception as e:
            answer = None, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
