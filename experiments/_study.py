"""The common part of studies: measures cases one after the other, into a workdir.

A case is a dictionary of everything that its result depends on. ``results.json`` keeps all results
ever measured in a workdir, so that a study that was interrupted, or has more seeds or models than
before, measures only the missing cases.
"""

import concurrent.futures
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments._program import ConfigFlag
from experiments._program import run as run_program
from memcache_jax._checks.values import check_flag, check_instance, check_integer, check_number
from memcache_jax.training.config import to_json
from memcache_jax.training.durable import read_json, replace_file
from memcache_jax.training.pictures import new_figure as new_figure
from memcache_jax.training.workdir import lock_workdir

Case = dict[str, Any]
Row = dict[str, Any]


class Study:
    """A workdir with ``config.json``, ``results.json``, tables and pictures.

    Args:
      workdir: the study's folder; created if it does not exist.
      config: the configuration, written beside the results.

    Raises:
      ValueError: if another process is writing there, or if it holds other results.
    """

    def __init__(self, workdir: str | Path, config: ConfigDict) -> None:
        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._lock = lock_workdir(self.workdir, "process")
        try:
            self._measured = _read(self.workdir / "results.json")
        except ValueError:
            self._lock.close()
            raise
        replace_file(self.workdir / "config.json", json.dumps(to_json(config), indent=2) + "\n")

    def measure(
        self,
        groups: Sequence[Sequence[Case]],
        measure: Callable[[list[Case]], Sequence[Row]],
        *,
        workers: int = 1,
    ) -> list[Row]:
        """Measures the cases without a result, and returns the results of all.

        Args:
          groups: cases, in groups that are measured together.
          measure: takes cases of one group and returns a result for each.
          workers: processes that measure groups side by side; above 1, ``measure`` must be a
            module-level function.

        Returns:
          For each case, its keys and those of its result.
        """
        groups = [[json.loads(json.dumps(case)) for case in group] for group in groups]
        missing = [[case for case in group if self._result(case) is None] for group in groups]
        missing = [group for group in missing if group]
        total = sum(map(len, groups))
        done = total - sum(map(len, missing))
        if done:
            print(f"{done} of {total} cases are already in {self.workdir / 'results.json'}.")
        began, first = time.monotonic(), done
        for group, results, seconds in _in_turn(measure, missing, workers):
            for case, result in zip(group, results, strict=True):
                self._measured.append(dict(case=case, result=dict(result), seconds=seconds))
            text = json.dumps(self._measured, indent=1)
            replace_file(self.workdir / "results.json", text + "\n")
            done += len(group)
            per_case = (time.monotonic() - began) / (done - first)
            left = f", about {per_case * (total - done) / 60:.0f} min left" if done < total else ""
            print(f"{done} of {total} cases{left}", flush=True)
        return [case | (self._result(case) or {}) for group in groups for case in group]

    def _result(self, case: Case) -> Row | None:
        return next((row["result"] for row in self._measured if row["case"] == case), None)

    def write_table(
        self, header: Sequence[str], rows: Sequence[Sequence[Any]], name: str = "table"
    ) -> None:
        """Prints a table and writes it to ``table.md``, or under another name."""
        text = markdown(header, rows)
        replace_file(self.workdir / f"{name}.md", text + "\n")
        print(f"\n{text}\n")

    def write_picture(self, figure: Any, name: str) -> None:
        """Writes a matplotlib figure, and prints its path."""
        path = self.workdir / f"{name}.png"
        figure.savefig(path, dpi=120)
        print(f"written: {path}")

    def close(self) -> None:
        """Releases the lock of the workdir."""
        self._lock.close()


def _in_turn(
    measure: Callable[[list[Case]], Sequence[Row]], groups: list[list[Case]], workers: int
) -> Iterator[tuple[list[Case], Sequence[Row], float]]:
    """Yields groups with their results and seconds, as they finish."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers == 1 or len(groups) < 2:
        yield from (_timed(measure, group) for group in groups)
        return
    # New interpreters, because JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_timed, measure, group) for group in groups]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            # They do not receive a signal sent to this process alone.
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _timed(
    measure: Callable[[list[Case]], Sequence[Row]], group: list[Case]
) -> tuple[list[Case], Sequence[Row], float]:
    began = time.monotonic()
    return group, measure(group), round(time.monotonic() - began, 1)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "case" in r for r in rows):
        raise ValueError(f"{path} holds results of something else: give another --workdir")
    return rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns an aligned Markdown table; floats get three decimals."""

    def text(x: Any) -> str:
        return f"{x:.3f}" if isinstance(x, float) else str(x)

    lines = [list(map(text, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def mean_and_spread(values: Sequence[float]) -> str:
    """Returns the mean, and for several values half their range, as ``0.912 ± 0.004``."""
    mean = sum(values) / len(values)
    spread = (max(values) - min(values)) / 2
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {spread:.3f}"


def check_keys(config: ConfigDict, known: Collection[str]) -> None:
    """Raises ValueError unless a configuration has the keys that a study reads, and no others."""
    if unknown := sorted(set(config) - set(known)):
        raise ValueError(
            f"the configuration has the unknown key {unknown[0]}; known are {', '.join(known)}"
        )
    if missing := [key for key in known if key not in config]:
        raise ValueError(f"the configuration lacks the key {missing[0]}")


def check_kinds(got: Any, default: Any, name: str = "") -> None:
    """Raises ValueError unless values have the same types as in the configuration's file.

    A flag may set a key to any tuple, so elements are checked too: each must be like one of the
    file's. Integers must be at least 1, or at least the file's value if that is smaller. Where the
    file has None, an empty tuple or a plain dictionary, any value passes.

    Args:
      got: the configuration, or a part of it.
      default: the same part of the file.
      name: the part's name.
    """
    if isinstance(default, ConfigDict):
        for key in set(default) & set(got):
            check_kinds(got[key], default[key], f"{name}.{key}" if name else key)
    elif isinstance(default, (tuple, list)) and default:
        check_instance(name, got, (tuple, list), f"a tuple, such as {default}")
        for i, x in enumerate(got):
            _check_like_one_of(x, default, f"{name}[{i}]")
    elif isinstance(default, bool):
        check_flag(name, got)
    elif isinstance(default, int):
        check_integer(name, got, min(1, default))
    elif isinstance(default, float):
        check_number(name, got)
    elif isinstance(default, str):
        check_instance(name, got, str, "a string")


def _check_like_one_of(got: Any, defaults: Sequence[Any], name: str) -> None:
    """Raises the last default's ValueError unless a value is like one of ``defaults``."""
    for i, default in enumerate(defaults, 1):
        try:
            if isinstance(default, (tuple, list)):
                check_instance(name, got, (tuple, list), f"a tuple, such as {default}")
                if len(got) != len(default):
                    raise ValueError(f"{name} must be like {default}, got {got}")
                for x, like in zip(got, default, strict=True):
                    check_kinds(x, like, name)
            else:
                check_kinds(got, default, name)
            return
        except ValueError:
            if i == len(defaults):
                raise


def run(program: Callable[[Any, Study], None], keys: Collection[str]) -> None:
    """Runs a study from the command line: ``--config=FILE --workdir=FOLDER``.

    Args:
      program: takes the configuration and the study.
      keys: those of the configuration.
    """
    config = ConfigFlag()
    workdir = flags.DEFINE_string("workdir", None, "The study's folder.", required=True)

    def main() -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            check_keys(config.value, keys)
            check_kinds(config.value, config.of_file())
            study = Study(workdir.value, config.value)
            try:
                program(config.value, study)
            finally:
                study.close()
        except KeyboardInterrupt:
            sys.exit("\nstopped; the same command continues with the remaining cases")

    run_program(main)
