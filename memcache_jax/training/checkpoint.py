"""Checkpoints of a run: saved while it goes on, restored when it resumes."""

import copy
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from memcache_jax.nn import upgrade_params
from memcache_jax.nn.upgrade import with_saved_names
from memcache_jax.training.distributed import all_agree, is_main_process, wait_for_all
from memcache_jax.training.durable import check_digests, write_digests
from memcache_jax.training.step import TrainState
from memcache_jax.training.streams import Streams

_log = logging.getLogger(__name__)

_NOTES = ("_CHECKPOINT_METADATA",)  # the file that holds them


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


class Restored(NamedTuple):
    """A checkpoint: its step, its state, and the notes saved with it."""

    step: int
    state: TrainState
    notes: dict[str, Any]


class Checkpoints:
    """A run's checkpoints: the state and the position in the data, saved asynchronously.

    Only one process may write to a workdir at a time. A killed save leaves a folder
    ``*.orbax-checkpoint-tmp``, which is never read, and removed here. Once a checkpoint is written,
    a thread adds the digests of its files, by which ``restore`` notices any change.

    Args:
      workdir: the run's folder; checkpoints go to its folder ``checkpoints``.
      keep: how many of the newest checkpoints to keep.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.folder = Path(os.path.abspath(workdir)) / "checkpoints"
        policy: Any = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            str(self.folder), preservation_policy=policy, cleanup_tmp_directories=True
        )
        # The step, and what is under way: the checkpoint, then its digests.
        self._saving: tuple[int, Future[bool], Future[None]] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._seconds = 0.0
        self._failed = False

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, newest first."""
        return sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)

    @staticmethod
    def steps_in(workdir: str | os.PathLike[str]) -> list[int]:
        """Returns the steps of the complete checkpoints in a workdir, newest first."""
        names = [path.name for path in Path(workdir, "checkpoints").glob("*") if path.is_dir()]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    @classmethod
    def notes_in(cls, workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
        """Returns the notes of the newest readable checkpoint in a workdir, or None."""
        for step in cls.steps_in(workdir):
            try:
                path = Path(os.path.abspath(workdir)) / "checkpoints" / str(step)
                check_digests(path, only=_NOTES)
                return _read_notes(path)
            except Exception as e:  # Orbax raises many kinds on damaged files
                _log.debug("no notes in the checkpoint of step %d: %s", step, e)
        return None

    def save(self, step: int, state: TrainState, data: Streams, notes: Mapping[str, Any]) -> None:
        """Starts a save, after the previous one has finished.

        Once this returns, the caller may donate the arrays, advance the streams and change the
        notes.

        Raises:
          CheckpointError: if this save could not start, or the previous one failed.
        """
        self.wait()
        try:
            response = self._checkpointer.save_checkpointables_async(
                step,
                dict(params=state.params, opt_state=state.opt_state),
                force=True,
                # A copy, since Orbax writes it after this returns. Positions in the data are here
                # because a later run may have another number of processes.
                custom_metadata=copy.deepcopy({**notes, "stream": data.get_state()}),
            )
        except Exception as e:
            raise self._error(step, e) from e
        assert response is not None, "a forced save is never skipped"
        written = self._thread.submit(response.result)
        self._saving = step, written, self._thread.submit(self._add_digests, step, written)

    def _add_digests(self, step: int, written: Future[bool]) -> None:
        if written.exception() is None and is_main_process():
            began = time.monotonic()
            try:
                write_digests(self.folder / str(step))
            except OSError as e:  # the checkpoint itself is on disk
                _log.warning("Could not write the digests of step %d: %s", step, e)
            self._seconds += time.monotonic() - began

    def wait(self, *, only_if_done: bool = False, for_digests: bool = True) -> None:
        """Waits for the save in progress.

        Args:
          only_if_done: return at once if the save has not finished.
          for_digests: also wait for its digests; a checkpoint without them can be restored.

        Raises:
          CheckpointError: if it failed.
        """
        if self._saving is None:
            return
        step, written, digests = self._saving
        if only_if_done and not digests.done():
            return
        try:
            written.result()
            if for_digests:
                digests.result()
        except Exception as e:
            self._saving = None
            raise self._error(step, e) from e
        if for_digests:
            self._saving = None

    def _error(self, step: int, cause: Exception) -> CheckpointError:
        self._failed = True
        # Not self.steps, which may include the failed save.
        good = [s for s in self.steps_in(self.folder.parent) if s != step]
        last = f"The last good one is of step {good[0]}" if good else "There is no earlier one"
        return CheckpointError(
            f"could not save the checkpoint of step {step} in {self.folder}: {root_cause(cause)}. "
            f"{last}. Once the cause is gone (is the disk full?), continue with "
            "--config.resume=True"
        )

    def restore(self, target: TrainState, data: Streams) -> Restored | None:
        """Returns the newest readable checkpoint, and moves the streams to its position.

        Newer, unreadable checkpoints are renamed to ``<step>.unreadable``. Parameters that are not
        trained are in no checkpoint.

        Args:
          target: shapes, dtypes and, if set, shardings of the state.
          data: streams made with the same arguments as the saved ones.

        Raises:
          ValueError: if there are checkpoints, but none can be read.
        """
        target = on_default_device(target._replace(frozen={}))
        reasons: dict[int, str] = {}
        for step in self.steps:
            state, notes = None, {}
            try:
                _check(self.folder / str(step))
            except (ValueError, OSError) as e:
                reasons[step] = root_cause(e)
            if all_agree(step not in reasons):  # to read is to wait for all processes
                try:
                    notes = _read_notes(self.folder / str(step))
                    state = self._load(step, target, notes)
                    data.set_state(notes.pop("stream"))
                except Exception as e:  # Orbax raises many kinds on damaged files
                    reasons[step] = root_cause(e)
            if not all_agree(step not in reasons) or state is None:
                reasons.setdefault(step, "another process cannot read it")
                continue
            for bad, reason in reasons.items() if is_main_process() else ():
                aside = _set_aside(self.folder / str(bad))
                _log.warning(
                    "The checkpoint of step %d cannot be read and is set aside as %s (%s). "
                    "Resuming from the last good one, of step %d.",
                    *(bad, aside, reason, step),
                )
            if reasons:
                wait_for_all("unreadable checkpoints set aside")
                self._checkpointer.reload()
            return Restored(step, state, notes)
        if reasons:
            raise ValueError(
                f"none of the checkpoints in {self.folder} can be read: "
                + "; ".join(f"step {step}: {reason}" for step, reason in reasons.items())
            )
        return None

    def _load(self, step: int, target: TrainState, notes: dict[str, Any]) -> TrainState:
        saved, options = target, notes.get("config", {}).get("optimizer")
        if options is not None and "name" not in options:
            # Before the optimizer had a name, clipping and AdamW were one flat chain.
            opt_state: Any = target.opt_state
            saved = target._replace(opt_state=(opt_state[0], *opt_state[1]))
        form = ocp.metadata(str(self.folder / str(step)), "params").metadata
        items = with_saved_names(dict(params=saved.params, opt_state=saved.opt_state), form)
        found = upgrade_params(self._checkpointer.load_checkpointables(step, items))
        leaves = jax.tree.leaves((found["params"], found["opt_state"]))
        return jax.tree.unflatten(jax.tree.structure(target), leaves)

    def close(self) -> None:
        """Waits for a save in progress, then stops the checkpointer's threads.

        Raises:
          CheckpointError: if that save failed.
        """
        try:
            self.wait()
            if self._seconds:
                _log.info(
                    "Digests of the checkpoints took %.1f s, beside the training.", self._seconds
                )
        finally:
            self._thread.shutdown()
            # Closing raises the error of a failed save a second time.
            try:
                self._checkpointer.close()
            except Exception:
                if not self._failed:
                    raise


def on_default_device(target: TrainState) -> TrainState:
    """Returns the target with the default device's sharding where it has none."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default), target
    )


def root_cause(error: BaseException) -> str:
    """Returns an error's first cause in one line; Orbax's last one is a page of details.

    A long one keeps its ends, since TensorStore names files before it says what is wrong.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:150]} ... {text[-150:]}"


def _check(path: Path) -> None:
    """Raises ValueError if a file of a checkpoint has changed; each process checks its share."""
    began = time.monotonic()
    count = check_digests(path, share=(jax.process_index(), jax.process_count()))
    if count is None:
        _log.info(
            "The checkpoint in %s has no digests: damage to its files can go unnoticed. An earlier "
            "version wrote it, or the run was killed before it wrote them.",
            path,
        )
    else:
        seconds = time.monotonic() - began
        _log.info("Compared %d files in %s with their digests in %.1f s.", count, path, seconds)


def _read_notes(path: Path) -> dict[str, Any]:
    notes = ocp.metadata(str(path), "params").custom_metadata
    if not isinstance(notes, dict) or not notes:
        raise ValueError(f"{path} has lost its metadata")
    if "stream" not in notes:
        raise ValueError(f"{path} was written by an earlier version of this library")
    return notes


def _set_aside(path: Path) -> Path:
    aside, number = path.with_name(f"{path.name}.unreadable"), 1
    while aside.exists():
        aside, number = path.with_name(f"{path.name}.unreadable.{number}"), number + 1
    return path.rename(aside)
