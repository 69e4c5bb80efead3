"""Documents in one row: where they part, who takes them apart, what a run that goes on does."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.sharding import make_mesh
from memcache_jax.training import default_config, train
from memcache_jax.training.config import with_choices_made
from memcache_jax.training.documents import document_ids, separator
from memcache_jax.training.durable import DIGESTS_FILE
from memcache_jax.training.models import model_options
from memcache_jax.training.step import abstract_state
from tests.covers import first_kept
from tests.training.runs import rows
from tests.training.steps import attention, titans

EOS = 256


@dataclasses.dataclass(frozen=True)
class Alone:
    """A mixer that takes no document_ids."""

    def build(self, in_features, num_heads, **options):
        return nnx.Linear(in_features, in_features, rngs=options["rngs"])


def caching(memory=None, segmentation=None, **options):
    parts = (memory or mc.memories.LinearAttention(), mc.GRM(), segmentation or mc.Constant(8))
    return attention(mixers=(mc.nn.MemoryCachingMixer(*parts, **options),))


def parted(model, length=32, mesh=None, **options):
    config = with_choices_made(default_config())
    config.batch_size, config.sequence_length = 2, length
    config.data.update(options)
    graph, target = abstract_state(model, optax.identity(), mesh)
    return separator(config, EOS, graph, target.params)


def test_an_end_token_opens_the_next_document():
    inputs = jnp.array([[EOS, 1, 2, EOS, 3], [1, EOS, EOS, 2, 2]])
    assert document_ids(inputs, EOS).tolist() == [[1, 1, 1, 2, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize(
    "model",
    first_kept(
        2,
        dict(
            titans=titans(),
            logarithmic=caching(mc.memories.GatedDeltaNet(), mc.Logarithmic(8)),
            attention=attention(),
            lengths=caching(segmentation=mc.Lengths((8, 24))),
            checkpoint=caching(start="checkpoint"),
        ),
    ),
)
def test_models_that_take_documents(model):
    assert parted(model) == EOS
    assert parted(model, isolate_documents=False) is None


def test_a_model_that_takes_none_is_told_of_the_option():
    with pytest.raises(ValueError, match=r"data.isolate_documents needs .*isolate_documents=False"):
        parted(attention(mixers=(Alone(),)))
    assert parted(attention(mixers=(Alone(),)), isolate_documents=False) is None


def test_a_model_that_fits_no_row_is_told_that():
    with pytest.raises(ValueError, match=r"hold 16 tokens, got 32") as error:
        parted(caching(segmentation=mc.Lengths((8, 8))))
    assert "isolate_documents" not in str(error.value)


def test_parts_of_a_sequence_take_documents():
    mesh = make_mesh(dict(seq=2), devices=jax.devices()[:2])
    logarithmic = mc.Logarithmic(8)
    with jax.set_mesh(mesh):
        for model in (caching(), caching(start="checkpoint"), caching(segmentation=logarithmic)):
            assert parted(model, mesh=mesh) == EOS
        with pytest.raises(ValueError, match="a rule whose runs compose") as error:
            parted(caching(mc.memories.Titans(8), logarithmic), mesh=mesh)
    assert "isolate_documents" not in str(error.value)


@pytest.fixture
def short_documents(config, tmp_path):
    """The configuration of a run on documents of which each row has several."""
    lines = [json.dumps({"text": f"{i} and {i + 1}"}) for i in range(300)]
    (tmp_path / "short").mkdir()
    for name in "abcd":
        (tmp_path / "short" / f"{name}.jsonl").write_text("\n".join(lines))
    config.data.files = (str(tmp_path / "short"),)
    return config


def forget_the_key(workdir):
    """Makes a run one of before there was the key, or digests."""
    for path in workdir.rglob(DIGESTS_FILE):
        path.unlink()
    for path in (workdir / "config.json", *workdir.glob("checkpoints/*/_CHECKPOINT_METADATA")):
        stored = json.loads(path.read_text())
        config = stored["custom_metadata"]["config"] if "custom_metadata" in stored else stored
        del config["data"]["isolate_documents"]
        path.write_text(json.dumps(stored))


@pytest.mark.slow
def test_a_new_run_isolates_its_documents(short_documents, tmp_path):
    config = short_documents
    config.steps, config.optimizer.warmup_steps = 2, 0
    train(config, tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "config.json").read_text())
    assert stored["data"]["isolate_documents"] is True
    assert config.data.isolate_documents is None
    config.data.isolate_documents = False
    train(config, tmp_path / "packed")
    (new,), (packed,) = rows(tmp_path / "new"), rows(tmp_path / "packed")
    assert new["loss"] != packed["loss"]
    assert new["heldout_loss"] != packed["heldout_loss"]


@pytest.mark.slow
def test_a_run_of_before_goes_on_as_it_was(short_documents, tmp_path, caplog):
    caplog.set_level(logging.INFO, "memcache_jax")
    config = short_documents
    config.optimizer.warmup_steps = 0
    config.optimizer.final_fraction = 1.0  # so that the rate does not depend on the last step
    config.data.isolate_documents = False
    train(config, tmp_path / "whole")
    config.steps = 3
    train(config, tmp_path / "parts")
    forget_the_key(tmp_path / "parts")
    config.steps, config.resume, config.data.isolate_documents = 6, True, True
    with pytest.raises(ValueError, match=r"data\.isolate_documents: False, now True"):
        train(config, tmp_path / "parts")
    config.data.isolate_documents = None
    train(config, tmp_path / "parts")
    assert "goes on without" in caplog.text
    assert rows(tmp_path / "parts")[-1] == rows(tmp_path / "whole")[-1]
    stored = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert stored["data"]["isolate_documents"] is False


def test_a_run_that_its_mesh_does_not_take_leaves_no_workdir(short_documents, tmp_path):
    config = short_documents
    config.model = model_options(caching(mc.memories.Titans(8), mc.Logarithmic(8)))
    config.model.vocab_size = 257
    config.mesh.update(fsdp=1, seq=8)
    config.sequence_length = 64
    with pytest.raises(ValueError, match="a rule whose runs compose"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
