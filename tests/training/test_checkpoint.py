"""Checkpoints: what comes back, from what damage, and what a failed save says."""

import json
import logging
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from memcache_jax.nn.upgrade import with_saved_names
from memcache_jax.training import CheckpointError, load_model
from memcache_jax.training.checkpoint import Checkpoints
from memcache_jax.training.durable import DIGESTS_FILE, check_digests
from memcache_jax.training.files import find_files
from memcache_jax.training.models import model_config
from memcache_jax.training.optimizer import make_optimizer
from memcache_jax.training.records import Records
from memcache_jax.training.step import TrainState, abstract_state, create_state
from memcache_jax.training.streams import Streams
from memcache_jax.training.tokenizers import ByteTokenizer
from tests.covers import kept_of
from tests.training.saves import no_space, state_of, truncate


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def flip_a_bit_of_the_notes(checkpoint):
    """The file stays JSON: a loss of 1 becomes 0."""
    file = checkpoint / "_CHECKPOINT_METADATA"
    before = file.read_bytes()
    place = before.index(b'"losses": [1') + len(b'"losses": [')
    file.write_bytes(before[:place] + b"0" + before[place + 1 :])


def flip_a_bit_of_the_digests(checkpoint):
    file = checkpoint / DIGESTS_FILE
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "arrays cut short": truncate("params/**/d/*"),
    "optimizer cut short": truncate("opt_state/**/d/*"),
    "metadata cut short": truncate("_CHECKPOINT_METADATA"),
    "no parameters": remove("params"),
    "no optimizer": remove("opt_state"),
    "nothing in it": empty,
    "a wrong byte": flip_a_byte,
    "a wrong bit in the notes": flip_a_bit_of_the_notes,
    "a wrong bit in the digests": flip_a_bit_of_the_digests,
}


@pytest.mark.filterwarnings("ignore")  # Orbax leaves tasks and sockets behind when it fails
@pytest.mark.parametrize("damage", kept_of(DAMAGES, *[*DAMAGES][::3]))
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


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_noticed(saved):
    checkpoint = saved[0] / "checkpoints" / "3"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert check_digests(checkpoint) == len(files) - 1 > 9
    for number, file in enumerate(files):
        good = file.read_bytes()
        bad = bytearray(good)
        bad[number * 37 % len(good)] ^= 1 << number % 8
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"is damaged|is missing"):
            check_digests(checkpoint)
        file.write_bytes(good)


def test_notes_with_a_flipped_bit_are_not_read(saved):
    flip_a_bit_of_the_notes(saved[0] / "checkpoints" / "3")
    notes: Any = Checkpoints.notes_in(saved[0])
    assert notes["losses"] == [2 / 3]


@pytest.mark.slow
def test_a_checkpoint_without_digests_is_restored_and_told(saved, batches, caplog):
    caplog.set_level(logging.INFO, "memcache_jax")
    (saved[0] / "checkpoints" / "3" / DIGESTS_FILE).unlink()
    restored, _ = restore(saved[0], batches())
    assert restored.step == 3
    assert_is(restored.state, 3)
    assert "3 has no digests: damage to its files can go unnoticed" in caplog.text


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_unfinished_save_is_ignored_and_removed(saved, batches):
    workdir, _ = saved
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    assert Checkpoints.steps_in(workdir) == [3, 2]
    assert restore(workdir, batches())[0].step == 3
    assert not (folder / "4.orbax-checkpoint-tmp").exists()


@pytest.mark.slow
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


@pytest.fixture
def config(config):
    config.model.mixers = ("memory_caching", "attention")
    config.model.memory = {"name": "SSD"}
    config.model.segmentation = {"name": "Constant", "size": 8}
    config.model.num_layers = 2
    return config


@pytest.fixture
def state(config):
    """A state after some steps: all of its arrays have numbers of their own."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    _, target = abstract_state(model_config(config.model), optimizer)
    state = create_state(model_config(config.model), optimizer, 0)
    leaves, tree = jax.tree.flatten(state)
    leaves = [x + jnp.asarray(i, x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, leaves), target


def with_earlier_names(tree) -> Any:
    saved = {"query_conv": 0, "gate": 0}
    return with_saved_names(tree, saved)


@pytest.mark.slow
def test_a_checkpoint_of_before(tmp_path, config, state, corpus_folder):
    state, target = state
    before = with_earlier_names(state)
    assert "gate" in before.params["layers"]["blocks"]["0"]["mixer"]
    assert "output_gate" in state.params["layers"]["blocks"]["0"]["mixer"]
    assert jax.tree.structure(before) != jax.tree.structure(state)
    data = Streams(
        Records(find_files(str(corpus_folder))),
        ByteTokenizer(),
        sequence_length=32,
        batch_size=2,
        seed=0,
        num_streams=1,
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, before, data, {"losses": []})
    checkpoints.wait()
    names = ocp.metadata(str(tmp_path / "checkpoints" / "3"), "params").metadata
    assert "gate" in names["layers"]["blocks"]["0"]["mixer"]
    restored: Any = checkpoints.restore(target, data)
    assert restored.step == 3
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
    # A run that goes on saves under the names of now, and both stand side by side.
    checkpoints.save(4, TrainState(*restored.state), data, {"losses": []})
    checkpoints.close()
    for step in (4, 3):
        model: Any = load_model(tmp_path)[0]
        kernel = model.layers.blocks[0].mixer.output_gate.kernel[...]
        wanted = state.params["layers"]["blocks"]["0"]["mixer"]["output_gate"]["kernel"]
        np.testing.assert_array_equal(kernel, wanted)
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
