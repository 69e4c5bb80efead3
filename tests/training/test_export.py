"""Exports: who can read them, what replaces them, and models loaded from them."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax.training import checkpoints
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from memcache_jax.sharding import make_mesh
from memcache_jax.training import CheckpointError, load_model, train
from memcache_jax.training.export import export_params
from tests.training.saves import no_space, state_of, truncate

READERS: dict[str, Callable[[str], Any]] = {
    "orbax v1": ocp.load,
    "standard": lambda path: orbax.checkpoint.StandardCheckpointer().restore(path),
    "pytree": lambda path: orbax.checkpoint.PyTreeCheckpointer().restore(path),
    "flax": lambda path: checkpoints.restore_checkpoint(path, target=None),
}


def assert_holds(path, params):
    jax.tree.map(np.testing.assert_array_equal, ocp.load(str(path)), params)


@pytest.mark.parametrize("name", READERS)
def test_export_needs_no_class_of_ours(tmp_path, name):
    path = export_params(tmp_path, state_of(2).params)
    loaded = READERS[name](str(path))
    assert type(loaded) is type(loaded["layer"]) is dict
    assert {type(leaf) for leaf in jax.tree.leaves(loaded)} == {np.ndarray}
    jax.tree.map(np.testing.assert_array_equal, loaded, state_of(2).params)


# Reads the export of eight devices in every way, on one.
READ = """
import sys
import jax, numpy as np, orbax.checkpoint
from flax.training import checkpoints
from orbax.checkpoint import v1 as ocp
path = sys.argv[1]
assert jax.device_count() == 1
want = {"layer": {"kernel": np.arange(512, dtype=np.float32).reshape(16, 32)}, "scale": np.ones(3)}
numpy = jax.tree.map(np.zeros_like, want)
of_type = jax.tree.map(lambda x: orbax.checkpoint.RestoreArgs(restore_type=np.ndarray), want)
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), want)
standard, pytree = orbax.checkpoint.StandardCheckpointer(), orbax.checkpoint.PyTreeCheckpointer()
found = {
    np.ndarray: [
        ocp.load(path),
        ocp.load(path, numpy),
        standard.restore(path),
        standard.restore(path, numpy),
        pytree.restore(path),
        pytree.restore(path, restore_args=of_type),
        checkpoints.restore_checkpoint(path, target=None),
        checkpoints.restore_checkpoint(path, target=numpy),
    ],
    jax.Array: [ocp.load(path, placed), standard.restore(path, placed)],
}
for kind, trees in found.items():
    for tree in trees:
        assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(tree)), tree
        jax.tree.map(np.testing.assert_array_equal, tree, want)
"""


def python(script, *arguments, **environment):
    """A Python process with its own devices, one by default."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_export_of_eight_devices_is_read_on_one(tmp_path):
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    kernel = jax.device_put(jnp.arange(512.0).reshape(16, 32), sharding)
    scale = jax.device_put(jnp.ones(3), NamedSharding(mesh, PartitionSpec()))
    path = export_params(tmp_path, {"layer": {"kernel": kernel}, "scale": scale})
    process = python(READ, path)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


# One of two processes, each with a device that has half of the rows.
WRITE = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from memcache_jax.sharding import make_mesh
from memcache_jax.training.export import export_params
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
mesh = make_mesh(dict(fsdp=2))
kernel = np.arange(5000, dtype=np.float32).reshape(50, 100)
def put(x, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
params = {"layer": {"0": {"kernel": put(kernel, "fsdp")}}, "scale": put(np.float32([2, 3]))}
for _ in range(2):
    export_params(sys.argv[1], params)
"""


@pytest.mark.slow
def test_two_processes_write_one_export(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [python(WRITE, tmp_path, address, index) for index in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    kernel = np.arange(5000).reshape(50, 100)
    assert_holds(tmp_path / "params", {"layer": {"0": {"kernel": kernel}}, "scale": [2, 3]})
    assert [path.name for path in tmp_path.iterdir()] == ["params"]


def test_export_replaces_the_old_one(tmp_path):
    for step in (1, 2):
        export_params(tmp_path, state_of(step).params)
    assert_holds(tmp_path / "params", state_of(2).params)
    assert [path.name for path in tmp_path.iterdir()] == ["params"]


def test_a_failed_export_leaves_the_old_one(tmp_path):
    export_params(tmp_path, state_of(1).params)
    big = {"kernel": jax.random.normal(jax.random.key(0), (500_000,))}
    with no_space(100_000), pytest.raises(CheckpointError, match="File too large"):
        export_params(tmp_path, big)
    assert_holds(tmp_path / "params", state_of(1).params)
    export_params(tmp_path, state_of(2).params)
    assert_holds(tmp_path / "params", state_of(2).params)


@pytest.mark.parametrize("left", ["params.new", "params.new.orbax-checkpoint-tmp", "params.old"])
def test_what_a_killed_export_left_is_cleared(tmp_path, left):
    export_params(tmp_path, state_of(1).params)
    shutil.copytree(tmp_path / "params", tmp_path / left)
    truncate("d/*")(tmp_path / left)
    assert_holds(tmp_path / "params", state_of(1).params)
    export_params(tmp_path, state_of(2).params)
    assert_holds(tmp_path / "params", state_of(2).params)
    assert [path.name for path in tmp_path.iterdir()] == ["params"]


@pytest.mark.slow
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
    # And so is one of which a bit has flipped.
    kernel = next((workdir / "checkpoints" / "3" / "params").rglob("d/*"))
    kernel.write_bytes(bytes([kernel.read_bytes()[0] ^ 1]) + kernel.read_bytes()[1:])
    shutil.move(workdir / "params.moved", workdir / "params")
    np.testing.assert_array_equal(load_model(workdir)[0].head.kernel[...], expected)
    shutil.move(workdir / "params", workdir / "params.moved")
    # Someone took only the export along, or a kill came between its two renames.
    shutil.rmtree(workdir / "checkpoints")
    for name in ("params", "params.new", "params.old"):
        shutil.move(workdir / "params.moved", workdir / name)
        np.testing.assert_array_equal(load_model(workdir)[0].head.kernel[...], expected)
        shutil.move(workdir / name, workdir / "params.moved")
    with pytest.raises(ValueError, match=r"holds no parameters .*no checkpoint and no export yet"):
        load_model(workdir)
    flipped = next((workdir / "params.moved").rglob("d/*"))
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))
    shutil.move(workdir / "params.moved", workdir / "params")
    with pytest.raises(ValueError, match=r"holds no parameters that can be read: tried .*params"):
        load_model(workdir)


def test_no_workdir(tmp_path):
    with pytest.raises(ValueError, match=r"expected the workdir of a training run.*no config.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {"vocab', "config.json is damaged, or no JSON: "),
        ("\xff", "config.json is damaged, or no JSON: "),
        ('{"model_type": "llama"}', "config.json is not that of a training run: it has no model"),
        ('{"model": {"features": 3}, "data": {}}', "config.json describes no model: "),
    ],
)
def test_a_config_that_is_torn_or_of_something_else(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


# A run of 3 steps: its ``config.json`` and ``params``, written while the parameter was ``gate``.
BEFORE = Path(__file__).parents[1] / "data" / "before_output_gate"


@pytest.mark.slow
def test_an_export_of_before(tmp_path):
    shutil.copytree(BEFORE, tmp_path / "run")
    model, _, _ = load_model(tmp_path / "run")
    logits = model(jnp.arange(97, 117)[None])[0, -1, 97:101]
    # As the version that wrote it has them.
    np.testing.assert_allclose(
        logits, [0.10433286, -0.17593522, -0.23197709, 0.26285422], rtol=1e-4
    )


@pytest.mark.slow
def test_an_export_by_orbax_v1(config, tmp_path):
    """As versions before this one wrote it, on the run's devices."""
    workdir = tmp_path / "run"
    train(config, workdir)
    params = ocp.load(workdir / "params")
    for left in ("checkpoints", "params"):
        shutil.rmtree(workdir / left)
    ocp.save(workdir / "params", jax.tree.map(jnp.asarray, params))
    assert (workdir / "params" / "state").is_dir()
    kernel = load_model(workdir)[0].head.kernel[...]
    np.testing.assert_array_equal(kernel, params["head"]["kernel"])
