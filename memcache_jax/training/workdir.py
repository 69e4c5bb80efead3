"""The folder of a run: which run it holds, and who writes to it."""

import contextlib
import fcntl
import logging
from pathlib import Path
from typing import Any, TextIO

from memcache_jax.training.checkpoint import Checkpoints
from memcache_jax.training.config import Config, config_differences, to_json
from memcache_jax.training.corpus import mended_files
from memcache_jax.training.distributed import all_agree, is_main_process
from memcache_jax.training.export import EXPORTS, RESULTS_FILE

_log = logging.getLogger(__name__)


def lock_workdir(workdir: Path, who: str = "run") -> TextIO:
    """Keeps other processes of this machine from writing to the workdir.

    The lock ends when the returned file is closed, or when the process ends.

    Raises:
      ValueError: if another process holds the lock; ``who`` is its name in the message.
    """
    file = (workdir / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another {who} is writing to {workdir}: wait for it, or give another --workdir"
        ) from None
    return file


def lock_run(workdir: Path) -> contextlib.AbstractContextManager[Any]:
    """Locks the workdir for all processes of a run, of which the main one holds the lock.

    Raises:
      ValueError: in every process, if another run holds the lock.
    """
    lock = None
    try:
        if is_main_process():
            lock = lock_workdir(workdir)
    finally:
        free = all_agree(lock is not None or not is_main_process())
    if not free:
        raise ValueError(f"another run is writing to {workdir}")
    return lock or contextlib.nullcontext()


def check_workdir(workdir: Path, *, resume: bool) -> list[int]:
    """Returns the steps of a workdir's checkpoints, from the newest of which a run resumes.

    Raises:
      ValueError: if there are any without ``resume``, or files of a finished run without any.
    """
    steps = Checkpoints.steps_in(workdir)
    if steps and not resume:
        raise ValueError(
            f"{workdir} holds a run with a checkpoint of step {steps[0]}: "
            "resume it with --config.resume=True, or give another --workdir"
        )
    finished = [name for name in (*EXPORTS, RESULTS_FILE) if (workdir / name).exists()]
    if finished and not steps:
        raise ValueError(
            f"{workdir} holds {', '.join(finished)} of a finished run without its checkpoints, "
            "which a new run would replace: give another --workdir, or move them away"
        )
    return steps


def check_same_run(
    workdir: Path, notes: dict[str, Any], config: Config, identity: dict[str, Any]
) -> None:
    """Raises ValueError if the configuration or the data (``Corpus.identity``) has changed.

    ``notes`` are those of the checkpoint from which the run resumes.
    """
    if different := config_differences(notes["config"], to_json(config)):
        raise ValueError(
            f"{workdir} holds a run with another configuration: {'; '.join(different)}. "
            "Restore the old values, or give another --workdir"
        )
    mended = mended_files(notes["data"], identity)
    if mended is None:
        before, now = (
            {key: x[key] for key in sorted(x.keys() - {"lines"}) if x[key] != y.get(key)}
            for x, y in ((notes["data"], identity), (identity, notes["data"]))
        )
        raise ValueError(
            f"the data of the run in {workdir} has changed from {before} to {now}. "
            "Bring the old files back, or give another --workdir; lines of .jsonl files may be "
            "mended, if they stay as many and the held-out text stays the same. Earlier versions "
            "read a file once for each of its links, and packed files as they were: such runs "
            "cannot go on"
        )
    if mended:
        _log.warning(
            "%s changed since the checkpoint, with as many lines: the run goes on at the same "
            "place, and reads the new text from there on.",
            ", ".join(mended),
        )
    before = notes["config"]["steps"]
    if before != config.steps:
        _log.info(
            "steps was %d and is %d: from here on the learning rate follows the new schedule.",
            *(before, config.steps),
        )
