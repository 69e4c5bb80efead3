"""Exports: who can read them, what replaces them, and models loaded from them."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from memcache_jax.training import load_model, train
from memcache_jax.training.export import export_params
from tests.training.saves import no_space, state_of, truncate


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # as a reader without a target
def test_export_needs_no_class_of_ours(tmp_path):
    path = export_params(tmp_path, state_of(2).params)
    loaded: Any = ocp.load(str(path))
    assert type(loaded) is type(loaded["layer"]) is dict
    jax.tree.map(np.testing.assert_array_equal, loaded, state_of(2).params)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_export_replaces_the_old_one(tmp_path):
    for step in (1, 2):
        export_params(tmp_path, state_of(step).params)
    jax.tree.map(
        np.testing.assert_array_equal, ocp.load(str(tmp_path / "params")), state_of(2).params
    )
    assert [path.name for path in tmp_path.iterdir()] == ["params"]


@pytest.mark.filterwarnings("ignore")
def test_a_failed_export_leaves_the_old_one(tmp_path):
    export_params(tmp_path, state_of(1).params)
    big = {"kernel": jax.random.normal(jax.random.key(0), (500_000,))}
    with no_space(100_000), pytest.raises(Exception, match="File too large"):
        export_params(tmp_path, big)
    jax.tree.map(
        np.testing.assert_array_equal, ocp.load(str(tmp_path / "params")), state_of(1).params
    )
    export_params(tmp_path, state_of(2).params)
    jax.tree.map(
        np.testing.assert_array_equal, ocp.load(str(tmp_path / "params")), state_of(2).params
    )


@pytest.mark.filterwarnings("ignore")
def test_a_model_loads_from_every_state_of_a_workdir(config, tmp_path):
    workdir = tmp_path / "run"
    train(config, workdir)
    model, tokenizer, stored = load_model(workdir)
    assert tokenizer.name == "bytes"
    assert stored.model.features == 16
    expected = model.head.kernel[...]
    # An unfinished run has no export.
    shutil.move(workdir / "params", workdir / "params.moved")
    np.testing.assert_array_equal(load_model(workdir)[0].head.kernel[...], expected)
    # A damaged newest checkpoint is passed over.
    truncate("params/**/d/*")(workdir / "checkpoints" / "6")
    assert not np.array_equal(load_model(workdir)[0].head.kernel[...], expected)
    # Someone took only the export along, or a kill came between its two renames.
    shutil.rmtree(workdir / "checkpoints")
    for name in ("params", "params.new", "params.old"):
        shutil.move(workdir / "params.moved", workdir / name)
        np.testing.assert_array_equal(load_model(workdir)[0].head.kernel[...], expected)
        shutil.move(workdir / name, workdir / "params.moved")
    with pytest.raises(ValueError, match=r"holds no parameters .*no checkpoint and no export yet"):
        load_model(workdir)


def test_no_workdir(tmp_path):
    with pytest.raises(ValueError, match=r"expected the workdir of a training run.*no config.json"):
        load_model(tmp_path)


# A run of 3 steps: its ``config.json`` and ``params``, written while the parameter was ``gate``.
BEFORE = Path(__file__).parents[1] / "data" / "before_output_gate"


def test_an_export_of_before(tmp_path):
    shutil.copytree(BEFORE, tmp_path / "run")
    model, _, _ = load_model(tmp_path / "run")
    logits = model(jnp.arange(97, 117)[None])[0, -1, 97:101]
    # As the version that wrote it has them.
    np.testing.assert_allclose(
        logits, [0.10433286, -0.17593522, -0.23197709, 0.26285422], rtol=1e-4
    )
