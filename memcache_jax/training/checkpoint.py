"""Checkpoints of a run, the export of its parameters, and the way back to a model."""

import copy
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from memcache_jax.nn import LanguageModel, upgrade_params
from memcache_jax.nn.upgrade import with_saved_names
from memcache_jax.training.config import Config
from memcache_jax.training.distributed import all_agree, is_main_process, wait_for_all
from memcache_jax.training.models import model_config
from memcache_jax.training.optimizer import make_optimizer
from memcache_jax.training.step import Params, TrainState, abstract_state
from memcache_jax.training.streams import Streams
from memcache_jax.training.tokenizers import Tokenizer, make_tokenizer

_log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
# An export that was killed between its two renames left one of the latter two names.
EXPORTS = ("params", "params.new", "params.old")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


class Restored(NamedTuple):
    """A checkpoint's step, its state, and what was noted with it."""

    step: int
    state: TrainState
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of the run in a workdir: state and place in the data, saved asynchronously.

    One process writes to a workdir at a time. A save that was killed leaves a
    ``*.orbax-checkpoint-tmp``, which is removed here and never read.

    Args:
      workdir: they lie in its folder ``checkpoints``.
      keep: the newest so many are kept.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.folder = Path(os.path.abspath(workdir)) / "checkpoints"
        policy: Any = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            str(self.folder), preservation_policy=policy, cleanup_tmp_directories=True
        )
        self._saving: tuple[int, ocp.AsyncResponse[bool]] | None = None
        self._failed = False

    @property
    def steps(self) -> list[int]:
        """The steps there are checkpoints of, the newest first."""
        return sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)

    @staticmethod
    def steps_in(workdir: str | os.PathLike[str]) -> list[int]:
        """Returns the steps of the checkpoints in a workdir, and touches nothing in it."""
        return _steps_on_disk(Path(workdir) / "checkpoints")

    def notes(self) -> dict[str, Any] | None:
        """Returns what was noted with the newest checkpoint that can be read, None without one."""
        for step in self.steps:
            try:
                return _read_notes(self.folder / str(step))
            except Exception as e:  # Orbax raises many kinds on damaged files
                _log.debug("no notes in the checkpoint of step %d: %s", step, e)
        return None

    def save(self, step: int, state: TrainState, data: Streams, notes: Mapping[str, Any]) -> None:
        """Begins to save, after the save before it has ended.

        Arrays may be donated, the streams moved on and the notes changed once this returns.

        Raises:
          CheckpointError: if this save could not begin, or the one before it failed.
        """
        self.wait()
        try:
            response = self._checkpointer.save_checkpointables_async(
                step,
                state._asdict(),
                force=True,
                # A copy, as they are written after this returns. The places in the data are those
                # of all processes, whose number may change, and so lie here.
                custom_metadata=copy.deepcopy({**notes, "stream": data.get_state()}),
            )
        except Exception as e:
            raise self._error(step, e) from e
        assert response is not None, "a forced save is never skipped"
        self._saving = step, response

    def wait(self, *, only_if_done: bool = False) -> None:
        """Waits for the save in progress to end.

        Args:
          only_if_done: return at once if it goes on.

        Raises:
          CheckpointError: if it failed.
        """
        if self._saving is None:
            return
        step, response = self._saving
        try:
            response.result(timeout=0 if only_if_done else None)
        except Exception as e:
            if only_if_done and isinstance(e, TimeoutError):
                return
            self._saving = None
            raise self._error(step, e) from e
        self._saving = None

    def _error(self, step: int, cause: Exception) -> CheckpointError:
        self._failed = True
        # Not the checkpointer's own list, which may hold the failed one.
        good = [s for s in _steps_on_disk(self.folder) if s != step]
        last = f"The last good one is of step {good[0]}" if good else "There is no earlier one"
        return CheckpointError(
            f"could not save the checkpoint of step {step} in {self.folder}: {_one_line(cause)}. "
            f"{last}. Once the cause is gone (is the disk full?), continue with "
            "--config.resume=True"
        )

    def restore(self, target: TrainState, data: Streams) -> Restored | None:
        """Returns the newest checkpoint that can be read, and sets the streams to their places.

        Newer ones that cannot be read are set aside under the name ``<step>.unreadable``.

        Args:
          target: shapes, dtypes and, if set, shardings of the state.
          data: streams made with the arguments of those that were saved.

        Raises:
          ValueError: if there are checkpoints, but none that can be read.
        """
        items = _on_default_device(target)._asdict()
        reasons: dict[int, str] = {}
        for step in self.steps:
            found, notes = None, {}
            try:
                notes = _read_notes(self.folder / str(step))
                form = ocp.metadata(str(self.folder / str(step)), "params").metadata
                saved = with_saved_names(items, form)
                found = upgrade_params(self._checkpointer.load_checkpointables(step, saved))
                data.set_state(notes.pop("stream"))
            except Exception as e:  # Orbax raises many kinds on damaged files
                reasons[step] = _one_line(e)
            if not all_agree(step not in reasons) or found is None:
                reasons.setdefault(step, "another process cannot read it")
                continue
            for bad, reason in reasons.items() if is_main_process() else ():
                aside = _set_aside(self.folder / str(bad))
                _log.warning(
                    "The checkpoint of step %d cannot be read and is set aside as %s (%s). "
                    "Going on from the last good one, of step %d.",
                    *(bad, aside, reason, step),
                )
            if reasons:
                wait_for_all("unreadable checkpoints set aside")
                self._checkpointer.reload()
            return Restored(step, TrainState(found["params"], found["opt_state"]), notes)
        if reasons:
            raise ValueError(
                f"none of the checkpoints in {self.folder} can be read: "
                + "; ".join(f"step {step}: {reason}" for step, reason in reasons.items())
            )
        return None

    def close(self) -> None:
        """Waits for a save in progress and gives the checkpointer's threads back.

        Raises:
          CheckpointError: if that save failed.
        """
        try:
            self.wait()
        finally:
            # It raises a failed save's error again, which has been raised by then.
            try:
                self._checkpointer.close()
            except Exception:
                if not self._failed:
                    raise


def export_params(workdir: str | os.PathLike[str], params: Params) -> Path:
    """Writes ``workdir/params``, which ``ocp.load`` reads as a nested dictionary of arrays.

    An export that is already there stays until the new one is complete.

    Raises:
      CheckpointError: if it cannot be written.
    """
    path = Path(os.path.abspath(workdir)) / "params"
    new, old = path.with_name("params.new"), path.with_name("params.old")
    if is_main_process():
        for left in (new, old):
            if left.exists() and (path.exists() or left == new):
                shutil.rmtree(left)
    wait_for_all("room for the export")
    try:
        ocp.save(str(new), params)
    except Exception as e:  # Orbax raises many kinds
        raise CheckpointError(f"could not write the parameters to {new}: {_one_line(e)}") from e
    if is_main_process():
        if path.exists():
            path.rename(old)
        new.rename(path)
        if old.exists():
            shutil.rmtree(old)
    return path


def load_model(workdir: str | os.PathLike[str]) -> tuple[LanguageModel, Tokenizer, Config]:
    """Returns the model that a run trained, its tokenizer, and the run's configuration.

    The parameters are those of the newest readable checkpoint, also of a run that has not ended;
    without checkpoints, those of the export in ``workdir/params``.

    Raises:
      ValueError: if the workdir holds no run, or no parameters.
    """
    workdir = Path(os.path.abspath(workdir))
    config = _read_config(workdir)
    config.model.implementation = None  # it was for the machine of the run
    model = model_config(config.model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    graph, target = abstract_state(model, optimizer)
    params = _load_params(workdir, _on_default_device(target).params)
    return nnx.merge(graph, params), load_tokenizer(workdir), config


def load_tokenizer(workdir: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer of a run.

    Raises:
      ValueError: if the workdir holds no run, or no tokenizer.
    """
    workdir = Path(os.path.abspath(workdir))
    data = _read_config(workdir).data
    name = "bytes" if data.tokenizer == "bytes" else str(workdir / TOKENIZER_FILE)
    return make_tokenizer(name, eos_token=data.eos_token)


def _read_config(workdir: Path) -> Config:
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"expected the workdir of a training run, got {workdir}: no config.json")
    return ConfigDict(json.loads(path.read_text()))


def _load_params(workdir: Path, target: Params) -> Params:
    places = [workdir / "checkpoints" / str(s) for s in _steps_on_disk(workdir / "checkpoints")]
    places += [workdir / name for name in EXPORTS]
    places = [place for place in places if place.exists()]
    for place in places:
        try:
            if place.parent == workdir:
                saved = with_saved_names(target, ocp.metadata(str(place)).metadata)
                return upgrade_params(ocp.load(str(place), saved))
            saved = with_saved_names(target, ocp.metadata(str(place), "params").metadata)
            found = ocp.load_checkpointables(str(place), {"params": saved})
            return upgrade_params(found["params"])
        except Exception as e:  # Orbax raises many kinds on damaged files
            _log.warning("%s cannot be read and is passed over: %s", place, _one_line(e))
    raise ValueError(
        f"{workdir} holds no parameters that can be read: "
        + (f"tried {', '.join(map(str, places))}" if places else "no checkpoint and no export yet")
    )


def _steps_on_disk(folder: Path) -> list[int]:
    """The steps of finished saves, the newest first."""
    names = [path.name for path in folder.glob("*") if path.is_dir()]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _read_notes(path: Path) -> dict[str, Any]:
    notes = ocp.metadata(str(path), "params").custom_metadata
    if not isinstance(notes, dict) or not notes:
        raise ValueError(f"{path} has lost its metadata")
    if "stream" not in notes:
        raise ValueError(f"{path} was written by an earlier version of this library")
    return notes


def _on_default_device(target: TrainState) -> TrainState:
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default), target
    )


def _set_aside(path: Path) -> Path:
    aside, number = path.with_name(f"{path.name}.unreadable"), 1
    while aside.exists():
        aside, number = path.with_name(f"{path.name}.unreadable.{number}"), number + 1
    return path.rename(aside)


def _one_line(error: BaseException) -> str:
    """The first cause of an error, which says more than the last, without its page of details."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]}..."
