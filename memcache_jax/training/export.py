"""A run's parameters on their own: written when it ends, and read back into a model."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import optax
import orbax.checkpoint
from flax import nnx
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from memcache_jax._checks import check_path
from memcache_jax.nn import LanguageModel, upgrade_params
from memcache_jax.nn.upgrade import with_saved_names
from memcache_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    on_default_device,
    root_cause,
)
from memcache_jax.training.config import Config, with_choices_made
from memcache_jax.training.distributed import is_main_process, wait_for_all, whole_arrays
from memcache_jax.training.durable import check_digests, read_json, write_digests
from memcache_jax.training.pretrained import FILE, Exported, PublicModel, run_model
from memcache_jax.training.step import Params, TrainState, abstract_state
from memcache_jax.training.tokenizers import Tokenizer, make_tokenizer

_log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
# An export that was killed between its two renames left one of the latter two names.
EXPORTS = ("params", "params.new", "params.old")
RESULTS_FILE = "results.json"


def export_params(workdir: str | os.PathLike[str], params: Params) -> Path:
    """Writes ``workdir/params``: a nested dictionary of NumPy arrays, whole, in one Orbax folder.

    Any number of devices reads them: the folder is a PyTree checkpoint of Orbax before its v1 API,
    which that API reads too, as ``flax.training.checkpoints`` does, and it names no sharding, with
    which a reader would ask for the run's devices. An earlier export stays in place until the new
    one is complete. With several processes, all of them call this, and each holds all parameters in
    its host's memory meanwhile.

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
        with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(str(new), whole_arrays(params))
        if is_main_process():
            write_digests(new)
    except Exception as e:  # Orbax raises many kinds
        raise CheckpointError(f"could not write the parameters to {new}: {root_cause(e)}") from e
    if is_main_process():
        if path.exists():
            path.rename(old)
        new.rename(path)
        if old.exists():
            shutil.rmtree(old)
    return path


def load_model(workdir: str | os.PathLike[str]) -> tuple[LanguageModel, Tokenizer, Config]:
    """Returns the model that a run trained, its tokenizer, and the run's configuration.

    The parameters come from the newest readable checkpoint, even of an unfinished run; without
    checkpoints, from the export in ``workdir/params``. Those that a run of a public model has not
    trained are in no checkpoint, and come from the public model's folder; the export has them.
    Adapters are merged. Without that folder the export serves, if it is as new as the checkpoint.

    Raises:
      ImportError: if the public model's folder is needed, and the package ``safetensors`` is not
        installed.
      ValueError: if the workdir holds no run, or no parameters; or if that folder is needed, and is
        gone or changed.
    """
    workdir = Path(os.path.abspath(check_path("workdir", workdir)))
    config = _read_config(workdir)
    config.model.implementation = None  # chosen for the machine that trained it
    public = PublicModel.of_run(workdir)
    if config.get("pretrained") is not None and public is None:
        raise ValueError(f"{workdir} has lost the {FILE} of the run")
    try:
        model = run_model(config, public)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{workdir / 'config.json'} describes no model: {root_cause(e)}") from e
    frozen = frozenset() if public is None else public.frozen(config)
    graph, target = abstract_state(model, optax.identity(), frozen=frozen)
    target = on_default_device(target)
    if public is None:
        loaded = nnx.merge(graph, _load_params(workdir, target.params))
    else:
        exported = Exported.of(public, config, graph, target.whole)
        loaded = exported.model(_load_params(workdir, target.params, exported))
    return loaded, load_tokenizer(workdir), config


def load_tokenizer(workdir: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer of a run.

    Raises:
      ValueError: if the workdir holds no run, or no tokenizer.
    """
    workdir = Path(os.path.abspath(workdir))
    data = _read_config(workdir).data
    name = "bytes" if data.tokenizer == "bytes" else str(workdir / TOKENIZER_FILE)
    return make_tokenizer(name, eos_token=data.eos_token)


def read_results(workdir: Path, step: int) -> dict[str, Any] | None:
    """Returns the results of a run that finished at ``step``, or None."""
    path = workdir / RESULTS_FILE
    results = read_json(path) if path.exists() else None
    return results if isinstance(results, dict) and results.get("step") == step else None


def _read_config(workdir: Path) -> Config:
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"expected the workdir of a training run, got {workdir}: no config.json")
    found = read_json(path)
    parts = ("model", "data")
    if not isinstance(found, dict) or not all(isinstance(found.get(x), dict) for x in parts):
        raise ValueError(f"{path} is not that of a training run: it has no {' and '.join(parts)}")
    return with_choices_made(ConfigDict(found), {"config": found})


def _load_params(workdir: Path, target: Params, exported: Exported | None = None) -> Params:
    steps = Checkpoints.steps_in(workdir)
    exports = [workdir / name for name in EXPORTS if (workdir / name).exists()]
    frozen: Params = {}
    if exported is not None and steps:
        try:
            frozen = exported.frozen(workdir)
        except (ImportError, OSError, ValueError) as e:
            said = (
                f"{workdir} trained only some parameters of the public model in "
                f"{exported.config.pretrained}, and needs that folder as it was: {root_cause(e)}"
            )
            if not exports or read_results(workdir, steps[0]) is None:  # written after the export
                if isinstance(e, ImportError):
                    raise
                raise ValueError(f"{said}. Put it back, or a link to where it is now") from e
            _log.warning("Reading the export of step %d: %s.", steps[0], said)
            steps, exports = [], exports[:1]  # not one of before
    checkpoints = [workdir / "checkpoints" / str(step) for step in steps]
    places = checkpoints + exports
    for place in places:
        try:
            if place in checkpoints:
                check_digests(place, only=("_", "params/"))  # the optimizer's state is not read
                saved = with_saved_names(target, ocp.metadata(str(place), "params").metadata)
                found = ocp.load_checkpointables(str(place), {"params": saved})
                params = upgrade_params(found["params"])
                return params if exported is None else exported.complete(params, frozen)
            check_digests(place)
            if exported is not None:
                target = on_default_device(TrainState(exported.target, ())).params
            saved = with_saved_names(target, ocp.metadata(str(place)).metadata)
            return upgrade_params(ocp.load(str(place), saved))
        except Exception as e:  # Orbax raises many kinds on damaged files
            _log.warning("Skipping %s, which cannot be read: %s", place, root_cause(e))
    raise ValueError(
        f"{workdir} holds no parameters that can be read: "
        + (f"tried {', '.join(map(str, places))}" if places else "no checkpoint and no export yet")
    )
