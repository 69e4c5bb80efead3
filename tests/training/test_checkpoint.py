"""Checkpoints: what comes back, from what damage, and what a failed save says."""

import contextlib
import resource
import shutil
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from memcache_jax.training import CheckpointError, load_model, train
from memcache_jax.training.checkpoint import Checkpoints
from memcache_jax.training.export import export_params
from memcache_jax.training.files import Records, find_files
from memcache_jax.training.step import TrainState
from memcache_jax.training.streams import Streams
from memcache_jax.training.tokenizers import ByteTokenizer


def state_of(step):
    params = {"layer": {"0": {"kernel": jnp.arange(5000.0) * step}}, "scale": jnp.float32(step)}
    return TrainState(params, (jnp.int32(step), {"mu": jnp.ones(3) * step}))


@pytest.fixture
def batches(corpus_folder):
    def make():
        records = Records(find_files(str(corpus_folder)))
        return Streams(
            records, ByteTokenizer(), sequence_length=32, batch_size=2, seed=0, num_streams=2
        )

    return make


@pytest.fixture
def saved(tmp_path, batches):
    """A workdir with checkpoints of steps 1 to 3, of which two are kept, and the batch after 3."""
    checkpoints, data = Checkpoints(tmp_path / "run", keep=2), batches()
    for step in (1, 2, 3):
        next(data)
        checkpoints.save(step, state_of(step), data, {"losses": [step / 3]})
    upcoming = next(data)
    checkpoints.close()
    return tmp_path / "run", upcoming


def restore(workdir, data):
    checkpoints = Checkpoints(workdir, keep=2)
    try:
        restored: Any = checkpoints.restore(jax.eval_shape(lambda: state_of(1)), data)
        return restored, checkpoints.steps
    finally:
        checkpoints.close()


def assert_is(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))


def test_state_data_and_notes_come_back(saved, batches):
    workdir, upcoming = saved
    data = batches()
    restored, steps = restore(workdir, data)
    assert steps == [3, 2]
    assert restored.step == 3
    assert restored.notes == {"losses": [1.0]}
    assert_is(restored.state, 3)
    np.testing.assert_array_equal(next(data), upcoming)


def test_the_flat_optimizer_of_earlier_versions_comes_back(tmp_path, batches):
    checkpoints, data = Checkpoints(tmp_path), batches()
    state: Any = state_of(3)
    flat = state._replace(opt_state=(optax.EmptyState(), *state.opt_state))
    checkpoints.save(3, flat, data, {"config": {"optimizer": {"clip_norm": 1.0}}})
    checkpoints.wait()
    target = state._replace(opt_state=(optax.EmptyState(), state.opt_state))
    restored: Any = checkpoints.restore(jax.eval_shape(lambda: target), data)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored.state, target)


def test_nothing_to_restore(tmp_path, batches):
    assert restore(tmp_path, batches()) == (None, [])


def test_a_save_is_not_changed_by_later_steps(tmp_path, batches):
    checkpoints, data = Checkpoints(tmp_path), batches()
    state = TrainState({"kernel": jnp.zeros((1000, 1000))}, (jnp.zeros(3),))
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    notes = {"losses": [1.0]}
    checkpoints.save(1, state, data, notes)
    notes["losses"].append(2.0)
    for _ in range(20):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored: Any = checkpoints.restore(jax.eval_shape(lambda: state), data)
    assert not np.any(restored.state.params["kernel"])
    assert restored.notes == {"losses": [1.0]}
    checkpoints.close()


def truncate(pattern):
    def damage(checkpoint):
        files = [path for path in checkpoint.glob(pattern) if path.is_file()]
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def remove(name):
    return lambda checkpoint: shutil.rmtree(checkpoint / name)


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def flip_a_byte(checkpoint):
    for file in checkpoint.glob("params/**/d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)


DAMAGES = {
    "arrays cut short": truncate("params/**/d/*"),
    "optimizer cut short": truncate("opt_state/**/d/*"),
    "metadata cut short": truncate("_CHECKPOINT_METADATA"),
    "no parameters": remove("params"),
    "no optimizer": remove("opt_state"),
    "nothing in it": empty,
    "a wrong byte": flip_a_byte,
}


@pytest.mark.filterwarnings("ignore")  # Orbax leaves tasks and sockets behind when it fails
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_falls_back_to_the_last_good_one(saved, batches, damage, caplog):
    workdir, _ = saved
    damage(workdir / "checkpoints" / "3")
    data = batches()
    restored, steps = restore(workdir, data)
    assert restored.step == 2
    assert_is(restored.state, 2)
    assert steps == [2]
    assert "step 3 cannot be read and is set aside" in caplog.text
    assert "last good one, of step 2" in caplog.text
    assert (workdir / "checkpoints" / "3.unreadable").is_dir()
    fresh = batches()
    next(fresh)
    next(fresh)
    np.testing.assert_array_equal(next(data), next(fresh))


@pytest.mark.filterwarnings("ignore")
def test_all_damaged_is_an_error_and_nothing_is_moved(saved, batches):
    workdir, _ = saved
    for step in (2, 3):
        truncate("params/**/d/*")(workdir / "checkpoints" / str(step))
    with pytest.raises(
        ValueError, match=r"none of the checkpoints .* can be read: step 3: .*step 2"
    ):
        restore(workdir, batches())
    assert Checkpoints.steps_in(workdir) == [3, 2]


def test_an_unfinished_save_is_ignored_and_removed(saved, batches):
    workdir, _ = saved
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    assert Checkpoints.steps_in(workdir) == [3, 2]
    assert restore(workdir, batches())[0].step == 3
    assert not (folder / "4.orbax-checkpoint-tmp").exists()


@contextlib.contextmanager
def no_space(size):
    """Makes every write beyond ``size`` bytes of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["wait", "next save", "close"])
def test_a_failed_save_is_told_and_earlier_ones_stay(saved, batches, when):
    workdir, _ = saved
    data = batches()
    checkpoints = Checkpoints(workdir, keep=2)
    big = TrainState({"kernel": jax.random.normal(jax.random.key(0), (500_000,))}, (jnp.zeros(3),))
    end = {
        "wait": checkpoints.wait,
        "next save": lambda: checkpoints.save(5, big, data, {"losses": []}),
        "close": checkpoints.close,
    }
    with no_space(100_000):
        checkpoints.save(4, big, data, {"losses": []})
        with pytest.raises(CheckpointError) as error:
            end[when]()
    checkpoints.close()
    message = str(error.value)
    assert "could not save the checkpoint of step 4" in message
    assert "The last good one is of step 3" in message
    assert "File too large" in message
    restored, steps = restore(workdir, data)
    assert steps == [3, 2]
    assert_is(restored.state, 3)


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
