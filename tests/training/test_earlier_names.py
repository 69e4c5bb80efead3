"""What was saved before a parameter was renamed still loads: exports, checkpoints, states."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import memcache_jax as mc
from memcache_jax.nn.layers import SwiGLU
from memcache_jax.nn.upgrade import with_saved_names
from memcache_jax.training import load_model
from memcache_jax.training.checkpoint import Checkpoints
from memcache_jax.training.files import Records, find_files
from memcache_jax.training.models import model_config
from memcache_jax.training.optimizer import make_optimizer
from memcache_jax.training.step import TrainState, abstract_state, create_state
from memcache_jax.training.streams import Streams
from memcache_jax.training.tokenizers import ByteTokenizer

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


def test_a_state_of_before():
    layer = mc.nn.MemoryCaching(
        8,
        2,
        memory=mc.memories.SSD(),
        aggregation=mc.GRM(),
        segmentation=mc.Constant(4),
        rngs=nnx.Rngs(0),
    )
    model = nnx.Dict(mixer=layer, mlp=SwiGLU(8, 8, rngs=nnx.Rngs(1)))
    graph, state = nnx.split(model)
    before = with_earlier_names(state)
    assert set(before["mixer"]) - set(state["mixer"]) == {"gate"}
    assert set(before["mlp"]) == {"gate", "up", "down"}
    upgraded = mc.nn.upgrade_params(before)
    assert jax.tree.structure(upgraded) == jax.tree.structure(state)
    x = jnp.ones((1, 9, 8))
    new: Any = nnx.merge(graph, upgraded)
    np.testing.assert_array_equal(new["mixer"](x), layer(x))
    # Names of now stay, in other containers too.
    pure = nnx.to_pure_dict(state)
    assert jax.tree.structure(mc.nn.upgrade_params(pure)) == jax.tree.structure(pure)
    moments = (jnp.zeros(()), [nnx.to_pure_dict(before)])
    assert jax.tree.structure(mc.nn.upgrade_params(moments)) == jax.tree.structure(
        (jnp.zeros(()), [pure])
    )
