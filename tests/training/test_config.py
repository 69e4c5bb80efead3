"""Configurations: what they refuse, and how two of them are compared."""

import json
import logging
from typing import Any

import pytest
from flax import nnx
from ml_collections import ConfigDict

from memcache_jax.training.config import (
    check_config,
    config_differences,
    default_config,
    to_json,
    with_choices_made,
)
from memcache_jax.training.models import model_config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("log_every", 0),
        ("keep_checkpoints", 0),
        ("data.streams", 0),
        ("data.streams", 3),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.z_loss", -1.0),
        ("sample.max_new_tokens", -1),
        ("sample.prompt", "\udcff"),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_bad_numbers_are_refused(key, value):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=key):
        check_config(config)


def test_default_passes_the_checks():
    check_config(default_config())


def test_json_describes_the_same_model():
    config = default_config()
    config.model.mixers = ("memory_caching", "attention")
    again = ConfigDict(json.loads(json.dumps(to_json(config))))
    assert model_config(again.model) == model_config(config.model)
    assert to_json(again) == to_json(config)


def test_differences_name_keys_and_both_values():
    stored, given = default_config(), default_config()
    given.optimizer.learning_rate = 0.5
    given.data.files = ("a", "b")
    given.model.memory = ConfigDict({"name": "LinearAttention"})
    assert config_differences(to_json(stored), to_json(given)) == [
        "data.files: [], now ['a', 'b']",
        "model.memory.chunk_size: 32, now nothing",
        "model.memory.depth: 2, now nothing",
        "model.memory.expansion: 2, now nothing",
        "model.memory.name: 'Titans', now 'LinearAttention'",
        "optimizer.learning_rate: 0.001, now 0.5",
    ]


def test_steering_is_no_difference():
    stored, given = default_config(), default_config()
    given.steps, given.resume, given.sample.prompt, given.tensorboard = 7, True, "x", True
    given.log_every, given.eval_every, given.checkpoint_every, given.keep_checkpoints = 1, 1, 1, 9
    assert config_differences(to_json(stored), to_json(given)) == []


def test_a_run_of_before_there_were_streams_had_one():
    stored, given = to_json(default_config()), default_config()
    del stored["data"]["streams"]
    assert config_differences(stored, to_json(given)) == []
    given.data.streams = 2
    assert config_differences(stored, to_json(given)) == ["data.streams: 1, now 2"]


def test_a_run_of_before_documents_were_isolated_did_not():
    stored, given = to_json(default_config()), default_config()
    del stored["data"]["isolate_documents"]
    given.data.isolate_documents = False
    assert config_differences(stored, to_json(given)) == []
    given.data.isolate_documents = True
    different = ["data.isolate_documents: False, now True"]
    assert config_differences(stored, to_json(given)) == different


def test_new_runs_make_the_choices_that_are_left_open():
    config = default_config()
    config.model.memory = ConfigDict({"name": "DLA"})
    decided = with_choices_made(config.lock())
    made = decided.data.isolate_documents, decided.model.bounded, decided.model.memory.decay
    assert made == (True, True, True)
    assert config.data.isolate_documents is None
    config.data.isolate_documents = False
    assert with_choices_made(config).data.isolate_documents is False
    assert "decay" not in with_choices_made(default_config()).model.memory


@pytest.mark.parametrize("had", [True, False])
@pytest.mark.parametrize("given", [None, True, False])
def test_a_run_that_goes_on_keeps_what_it_had(had, given):
    config, before = default_config(), default_config()
    before.data.isolate_documents, config.data.isolate_documents = had, given
    decided = with_choices_made(config, {"config": to_json(before)})
    assert decided.data.isolate_documents is (had if given is None else given)


def test_a_configuration_of_before_there_were_the_keys(caplog):
    caplog.set_level(logging.INFO, "memcache_jax")
    old, config = default_config(), default_config()
    del old.data.isolate_documents, old.model.bounded
    old.model.memory = config.model.memory = ConfigDict({"name": "DLA"})
    assert with_choices_made(old).data.isolate_documents is True
    assert not caplog.text
    decided = with_choices_made(config, {"config": to_json(old)})
    made = decided.data.isolate_documents, decided.model.bounded, decided.model.memory.decay
    assert made == (False, False, False)
    assert caplog.text.count("goes on without") == 3
    assert not config_differences(to_json(old), to_json(decided))
    (mixer,) = model_config(decided.model).mixers
    layer: Any = mixer.build(8, 2, rngs=nnx.Rngs(0))
    assert "log_alpha" not in layer.controls
    assert layer.memory.max_step_norm is None
