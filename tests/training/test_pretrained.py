"""Runs that begin with a public model: what they train, go on with, and leave."""

import json
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

import memcache_jax as mc
from configs import pretrained as configs
from memcache_jax.training import load_model, train
from memcache_jax.training.config import check_config, with_choices_made
from memcache_jax.training.corpus import load_corpus
from memcache_jax.training.pretrained import PublicModel, begin
from memcache_jax.training.step import abstract_state, evaluate, make_eval_step
from tests.cases import assert_close
from tests.covers import kept_of
from tests.pretrained.test_read import FOLDERS
from tests.training.runs import assert_same_params, rows


def public_folder(folder, name):
    """A tiny public model with a tokenizer of its 97 ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    shutil.copytree(FOLDERS / name, folder)
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, 97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    options = json.dumps({"eos_token": {"content": "<end>"}})
    (folder / "tokenizer_config.json").write_text(options)
    return folder


@pytest.fixture
def config(tmp_path):
    """A run of four steps of Mamba-2 with segments of 8 tokens."""
    (tmp_path / "text").mkdir()
    for i in range(8):
        words = " ".join(f"w{(i * j * j + 3 * j) % 96 + 1}" for j in range(150))
        (tmp_path / "text" / f"{i}.txt").write_text(words)
    config = configs.get_config()
    config.pretrained = str(public_folder(tmp_path / "public", "mamba2"))
    config.steps, config.batch_size, config.sequence_length = 4, 2, 24
    config.log_every, config.eval_every, config.checkpoint_every = 1, 4, 2
    config.model.segmentation.size, config.model.dtype = 8, "float32"
    config.data.files, config.data.heldout_fraction = (str(tmp_path / "text"),), 0.3
    config.data.heldout_tokens, config.sample.max_new_tokens = 96, 4
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 1
    config.lora.rank = 2
    return config


def started(config):
    """A run's state before its first step, its model, and the held-out rows."""
    check_config(config)
    public = PublicModel.of(config)
    assert public is not None
    config = public.resolved(with_choices_made(config))
    optimizer = optax.adam(1e-3)
    graph, target = abstract_state(public.model(config), optimizer, frozen=public.frozen(config))
    state = begin(public, config, optimizer, target, None)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (state, target))
    assert shapes[0] == shapes[1]
    return SimpleNamespace(graph=graph, state=state, heldout=load_corpus(config).heldout)


@pytest.mark.parametrize("tune", kept_of(["all", "caches", "lora"], "caches"))
def test_step_zero_is_the_uniform_model_and_only_what_is_trained_has_moments(config, tune):
    config.tune = tune
    run = started(config)
    uniform = mc.nn.with_memory_caching(
        mc.pretrained.load(config.pretrained), segmentation=mc.Constant(8)
    )
    graph, state = nnx.split(uniform, nnx.Param)
    end = 0
    losses = [
        evaluate(make_eval_step(of, end), params, run.heldout, 2)["heldout_loss"]
        for of, params in (
            (run.graph, run.state.whole),
            (graph, nnx.to_pure_dict(state)),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    moments: Any = run.state.opt_state[0].mu
    assert flatten_dict(moments).keys() == flatten_dict(run.state.params).keys()
    new = {path[-2] if path[-1] == "kernel" else path[-1] for path in flatten_dict(moments)}
    wanted = {"connector", "temperature"}
    if tune == "lora":
        wanted |= {"down", "up"}
    assert new == wanted if tune != "all" else new > wanted
    assert bool(run.state.frozen) == (tune != "all")


@pytest.mark.parametrize("tune", kept_of(["all", "caches", "lora"], "lora"))
def test_a_run_is_exported_and_written_as_its_library_does(config, tmp_path, tune):
    config.tune, config.sample.every = tune, 2 if tune == "lora" else 0
    whole = tmp_path / "whole"
    results = train(config, whole)
    assert results["step"] == 4
    assert len(results["sample"])

    checkpoint = ocp.metadata(str(whole / "checkpoints" / "4"), "params").metadata
    before = mc.pretrained.load(config.pretrained)
    its_own = set(flatten_dict(ocp.load(str(whole / "params"))))
    kept = set(flatten_dict(checkpoint))
    assert any("connector" in path for path in its_own & kept)
    assert any("low_rank" in path for path in kept) == (tune == "lora")
    assert ("embedding", "embedding") in (kept if tune == "all" else its_own - kept)

    # Of the checkpoint and the folder, and of the export alone.
    tokens = jnp.asarray(np.arange(2 * 20).reshape(2, 20) % 97)
    run = jax.jit(lambda model, tokens: model(tokens))
    model, tokenizer, _ = load_model(whole)
    assert tokenizer.eos_id == 0
    logits = run(model, tokens)
    uniform = mc.nn.with_memory_caching(before, segmentation=mc.Constant(8))
    assert np.abs(logits - run(uniform, tokens)).max() > 1e-4
    shutil.rmtree(whole / "checkpoints")
    assert_close(run(load_model(whole)[0], tokens), logits, 1e-6)

    # Without the caches and their gates, it is a model of the family.
    mc.pretrained.save(model, tmp_path / "saved")
    saved = mc.pretrained.load(tmp_path / "saved")
    moved = {
        path
        for (path, new), (_, old) in zip(
            *(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (saved, before)), strict=True
        )
        if np.any(new[...] != old[...])
    }
    assert bool(moved) == (tune != "caches")
    if tune == "lora":
        assert {path[-1] for path in moved} == {"kernel"}
        assert {path[-2] for path in moved} == {"linear", "gate", "out"}


@pytest.mark.slow
def test_a_run_of_mixers_side_by_side_in_bfloat16(config, tmp_path):
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    folder = public_folder(tmp_path / "narrow", "falcon_h1")
    weights, given = folder / "model.safetensors", folder / "config.json"
    narrow = {name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(weights).items()}
    save_file(narrow, weights)
    given.write_text(json.dumps(json.loads(given.read_text()) | {"dtype": "bfloat16"}))
    config.pretrained, config.tune, config.model.dtype = str(folder), "lora", "bfloat16"
    config.steps, config.sample.max_new_tokens = 2, 0
    train(config, tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert np.all(np.isfinite(losses))
    assert losses[1] != losses[0]
    metadata = ocp.metadata(str(tmp_path / "run/checkpoints/2"), "params").metadata
    kept: dict[tuple, Any] = dict(flatten_dict(metadata))
    assert {x.dtype for x in kept.values()} == {np.dtype("float32")}
    sides = {path[path.index("mixer") + 1] for path in kept if "mixer" in path}
    assert sides == {"left", "right"}
    mc.pretrained.save(load_model(tmp_path / "run")[0], tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    moved = {name for name, x in saved.items() if np.any(x != narrow[name])}
    assert {name.split(".")[-2].split("_")[-1] for name in moved} == {"proj"}
    for side in ("mamba", "self_attn"):
        assert any(side in name for name in moved)
    for name in narrow.keys() - moved:
        assert saved[name].dtype == narrow[name].dtype


@pytest.mark.slow
def test_a_run_that_goes_on_does_so_bit_for_bit(config, tmp_path, monkeypatch):
    from memcache_jax.training import loop

    config.tune = "lora"
    train(config, tmp_path / "whole")

    class StopError(Exception):
        """Stands for a kill."""

    make = loop.make_train_step

    def make_mortal(*args):
        step, calls = make(*args), []

        def mortal(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise StopError
            return step(*arguments)

        return mortal

    monkeypatch.setattr(loop, "make_train_step", make_mortal)
    with pytest.raises(StopError):
        train(config, tmp_path / "parts")
    monkeypatch.undo()
    train(config, tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert_same_params(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_a_mesh_changes_no_loss(config, tmp_path):
    config.tune, config.steps, config.batch_size = "lora", 3, 4
    config.sample.max_new_tokens = 0
    train(config, tmp_path / "one")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    train(config, tmp_path / "eight")
    one, eight = (rows(tmp_path / name) for name in ("one", "eight"))
    for wanted, got in zip(one, eight, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_another_folder_is_not_the_model_that_the_run_began_with(config, tmp_path, monkeypatch):
    config.steps = 2
    train(config, tmp_path / "run")
    results = tmp_path / "run" / "results.json"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors", None)
        assert load_model(tmp_path / "run")[0].published is not None
        results.rename(tmp_path / "aside")
        with pytest.raises(ImportError, match=r"pip install '\.\[pretrained\]'"):
            load_model(tmp_path / "run")
    (tmp_path / "aside").rename(results)
    flip_a_bit(tmp_path / "public" / "model.safetensors")
    config.steps = 4
    with pytest.raises(ValueError, match="is not the model that the run began with"):
        train(config, tmp_path / "run")
    # The export has all of it, as long as it is of the newest checkpoint.
    assert load_model(tmp_path / "run")[0].published is not None
    results.write_text(json.dumps({"step": 1}))
    with pytest.raises(ValueError, match=r"files of weights changed.*Put it back, or a link to"):
        load_model(tmp_path / "run")
    (tmp_path / "public").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"needs that folder as it was: .* has no config.json"):
        load_model(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "params")
    results.write_text(json.dumps({"step": 2}))
    with pytest.raises(ValueError, match="needs that folder as it was"):
        load_model(tmp_path / "run")


def flip_a_bit(file):
    """In the middle, far from both ends."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def test_the_digest_is_of_every_byte_and_the_note_must_be_there(config, tmp_path):
    before = PublicModel.of(config)
    assert before is not None
    before.check_same(PublicModel.of(config), tmp_path)
    with pytest.raises(ValueError, match=r"pretrained.json is missing from"):
        before.check_same(PublicModel.of_run(tmp_path), tmp_path)
    weights = tmp_path / "public" / "model.safetensors"
    assert weights.stat().st_size > 3 * 4096
    flip_a_bit(weights)
    with pytest.raises(ValueError, match="its files of weights changed"):
        before.check_same(PublicModel.of(config), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tune", "some", "tune must be"),
        ("model.dtype", "float16", "model.dtype must be"),
        ("pretrained", None, "tune='caches' needs pretrained"),
        ("pretrained", "nowhere", "nowhere has no config.json"),
        ("model.num_layers", 3, "model.num_layers is the public model's own: leave it at 4, got 3"),
        ("model.mixers", ("attention",), "model.mixers is the public model's own"),
        ("model.aggregation", {"name": "Residual"}, "trains connectors and temperatures"),
        ("model.segmentation", {"name": "Constant", "size": 0}, "size must be"),
        ("lora.rank", 0, "lora.rank must be at least 1, got 0"),
    ],
    ids=str,
)
def test_what_a_run_does_not_take(config, tmp_path, key, value, message):
    if isinstance(value, dict):
        config.model[key.split(".")[1]] = value
    else:
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
