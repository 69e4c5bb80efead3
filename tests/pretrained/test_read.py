"""Published models read into a language model: logits, streams, and the files they came from."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, NamedSharding

import memcache_jax as mc
from tests.cases import assert_close
from tests.covers import kept_of, product

FOLDERS = Path(__file__).parents[1] / "data" / "pretrained"
NAMES = sorted(path.name for path in FOLDERS.iterdir())
# Logical names of a mesh that is not ours.
RULES = (("batch", "rows"), ("embed", "rows"), ("heads", "model"), ("mlp", "model"))
# Of every family either one pass, with gradients, or a stream.
SOME, OTHERS = NAMES[::2], NAMES[1::2]


def expected(name):
    with np.load(FOLDERS / name / "expected.npz") as file:
        return jnp.asarray(file["tokens"]), file["logits"]


@nnx.jit
def logits_and_gradients(model, tokens):
    """A model's logits, and the gradients of their mean square."""

    def loss(model):
        logits = model(tokens)
        return jnp.mean(logits**2), logits

    gradients, logits = nnx.grad(loss, has_aux=True)(model)
    return logits, gradients


@pytest.mark.parametrize("name", kept_of(NAMES, *SOME, fast=["mamba2"]))
def test_logits_are_those_of_the_familys_own_library(name):
    model = mc.pretrained.load(FOLDERS / name)
    tokens, wanted = expected(name)
    logits, gradients = logits_and_gradients(model, tokens)
    assert_close(logits, wanted, 2e-5)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.isfinite(gradient[...]).all(), path
        if path[-1] != "selection_bias":  # which has none
            assert np.abs(gradient[...]).max() > 0, path


@pytest.mark.parametrize("name", kept_of(NAMES, *OTHERS))
def test_a_stream_of_a_prompt_and_single_tokens_gives_the_same_logits(name):
    model = mc.pretrained.load(FOLDERS / name)
    tokens, wanted = expected(name)

    @jax.jit
    def stream(model, tokens):
        def call(cache, piece):
            hidden, cache = model.extend(piece, cache)
            return cache, model.logits(hidden)

        cache, prompt = call(model.init_cache(*tokens.shape), tokens[:, :7])
        _, rest = jax.lax.scan(call, cache, tokens.T[7:, :, None])
        return jnp.concatenate([prompt, jnp.moveaxis(rest[:, :, 0], 0, 1)], axis=1)

    assert_close(stream(model, tokens), wanted, 2e-5)


@pytest.mark.parametrize("name", kept_of(NAMES, *OTHERS, fast=["mamba2"]))
def test_what_is_saved_is_what_was_read(name, tmp_path):
    from safetensors.numpy import load_file

    mc.pretrained.save(mc.pretrained.load(FOLDERS / name), tmp_path / "saved")
    saved, read = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", FOLDERS / name)
    )
    assert saved.keys() == read.keys()
    for tensor, value in read.items():
        assert saved[tensor].dtype == value.dtype
        np.testing.assert_array_equal(saved[tensor], value)
    configs = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "saved", FOLDERS / name)
    )
    assert next(configs) == next(configs)


def test_bfloat16_files_keep_constants_of_decays_in_float32(tmp_path):
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    source = FOLDERS / "mamba2"
    narrow = {
        k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(source / "model.safetensors").items()
    }
    save_file(narrow, tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = mc.pretrained.load(tmp_path)
    step = model.layers.blocks[0].mixer.coefficients[0]
    assert (step.A_log.dtype, step.dt_bias.dtype) == (jnp.float32, jnp.float32)
    assert model.embedding.embedding.dtype == model.config.dtype == jnp.bfloat16
    mc.pretrained.save(model, tmp_path / "saved")
    for tensor, value in load_file(tmp_path / "saved" / "model.safetensors").items():
        np.testing.assert_array_equal(value, narrow[tensor])
        assert value.dtype == narrow[tensor].dtype
    wide = mc.pretrained.load(tmp_path, dtype=jnp.float32, param_dtype=jnp.float32)
    assert wide.embedding.embedding.dtype == wide.config.dtype == jnp.float32


def test_several_files_and_their_index(tmp_path):
    from safetensors.numpy import load_file, save_file

    source = FOLDERS / "mamba2"
    tensors = load_file(source / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    index = {}
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"part{i}.safetensors")
        index |= dict.fromkeys(part, f"part{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    one, several = (mc.pretrained.load(folder) for folder in (source, tmp_path))
    np.testing.assert_array_equal(one.embedding.embedding[...], several.embedding.embedding[...])
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks part1\.safetensors"):
        mc.pretrained.load(tmp_path)


def changed(tmp_path, name, tensors=None, **config):
    """A copy of a folder with other tensors, or other values in its configuration."""
    from safetensors.numpy import load_file, save_file

    source = FOLDERS / name
    given = json.loads((source / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(given))
    read = load_file(source / "model.safetensors")
    save_file(read if tensors is None else tensors(read), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("mamba2", dict(model_type="mamba7"), "model_type='mamba7' is not supported, only bamba"),
        ("mamba2", dict(hidden_act="gelu"), "hidden_act='gelu' is not supported, only 'silu'"),
        ("fla_gla", dict(attn={"layers": [1]}), "attn has no 'num_heads'"),
        ("fla_gla", dict(attn={"layers": [9], "num_heads": 2}), "different ones of .*, got 9"),
        ("fla_gla", dict(attn={"qk_norm": True}), "attn has qk_norm, which is not supported"),
        ("fla_rwkv7", dict(attn={"layers": [0], "num_heads": 2}), "layer 0 must not be attention"),
        ("qwen3_5_text", dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        ("qwen3_5_text", dict(rope_parameters={"rope_type": "yarn"}), "rope_type='yarn'"),
        ("nemotron_h", dict(layers_block_type=["mlp", "moe"]), "layer 0 of layers_block_type"),
        ("mamba2", dict(model_type=["a"]), r"config.json: model_type=\['a'\] is not supported"),
        (
            "mamba2",
            dict(num_hidden_layers="4"),
            "does not describe a supported model: TypeError: .*",
        ),
        ("mamba2", dict(n_groups=0), "config.json does not describe a supported model"),
        ("mamba2", dict(dtype="int3"), "config.json: dtype='int3' is not supported"),
        ("mamba2", dict(head_dim=16), "in_proj.weight of .* together, got .184, 32."),
    ],
    ids=str,
)
def test_what_is_not_served_is_named(tmp_path, name, config, message):
    with pytest.raises(ValueError, match=message):
        mc.pretrained.load(changed(tmp_path, name, **config))


def test_tensors_that_are_missing_or_left_over(tmp_path):
    name = "backbone.layers.1.mixer.D"
    folder = changed(tmp_path, "mamba2", lambda read: {k: v for k, v in read.items() if k != name})
    with pytest.raises(ValueError, match=f"has no tensor '{name}'"):
        mc.pretrained.load(folder)
    more = dict.fromkeys(("a", "b", "c", "d"), np.ones(2))
    folder = changed(tmp_path, "mamba2", lambda read: read | more)
    with pytest.raises(ValueError, match="unknown tensors: a, b, c and 1 more"):
        mc.pretrained.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixer.in_proj.weight", np.transpose, r"must be \(184, 32\) together, got \(32, 184\)"),
        ("mixer.out_proj.weight", np.transpose, r"must be \(32, 64\) together, got \(64, 32\)"),
        ("mixer.out_proj.weight", np.int8, "must be floating point, got int8: quantized"),
    ],
)
def test_tensors_of_other_shapes_or_kinds(tmp_path, name, change, message):
    """Tensors of the right size but another shape, and of other dtypes."""
    name = f"backbone.layers.0.{name}"
    folder = changed(
        tmp_path, "mamba2", lambda read: read | {name: np.ascontiguousarray(change(read[name]))}
    )
    with pytest.raises(ValueError, match=message):
        mc.pretrained.load(folder)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        mc.pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        mc.pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object, got list"):
        mc.pretrained.load(tmp_path)


def test_damaged_files_are_named(tmp_path):
    shutil.copytree(FOLDERS / "mamba2", tmp_path, dirs_exist_ok=True)
    weights, index = (tmp_path / f"model.safetensors{end}" for end in ("", ".index.json"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete"):
        mc.pretrained.load(tmp_path)
    for text in ("{", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            mc.pretrained.load(tmp_path)
    shutil.copy(FOLDERS / "mamba2" / weights.name, weights)
    index.write_text(json.dumps(dict(weight_map={"backbone.lost": weights.name})))
    with pytest.raises(ValueError, match=r"index\.json names backbone\.lost, which its files lack"):
        mc.pretrained.load(tmp_path)


def test_nothing_is_written_over(tmp_path):
    model = mc.pretrained.load(FOLDERS / "mamba2")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        mc.pretrained.save(model, tmp_path)
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.slow
def test_caches_change_no_logit_of_the_first_segment():
    model = mc.pretrained.load(FOLDERS / "qwen3_5_text")
    tokens, wanted = expected("qwen3_5_text")
    cached = mc.nn.with_memory_caching(model, segmentation=mc.Constant(16))
    logits = np.asarray(jax.jit(lambda model, tokens: model(tokens))(cached, tokens))
    assert_close(logits[:, :16], wanted[:, :16], 2e-5)
    assert np.abs(logits[:, 16:] - wanted[:, 16:]).max() > 1e-2 * np.abs(wanted).max()
    segmentations = {getattr(mixer, "segmentation", None) for mixer in cached.config.mixers}
    assert segmentations == {mc.Constant(16), None}


@pytest.mark.slow
def test_the_size_of_a_state_and_gates_that_begin_uniform():
    model = mc.pretrained.load(FOLDERS / "qwen3_5_text")
    tokens, _ = expected("qwen3_5_text")
    uniform, content = (
        mc.nn.with_memory_caching(
            model, segmentation=mc.Constant(16), aggregation=mc.GRM(gate=gate)
        )
        for gate in ("uniform", "content")
    )
    run = jax.jit(lambda model, tokens: model(tokens))
    assert_close(run(content, tokens), run(uniform, tokens), 1e-5)
    own = nnx.state(content, nnx.Param)
    new = nnx.to_flat_state(own)
    old = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    added = [(path, param) for path, param in new if path not in old]
    assert {path[-1] for path, _ in added} | {path[-2] for path, _ in added} >= {"temperature"}
    assert not any(np.any(param[...]) for _, param in added)
    # A state is (key, value) float32 numbers per head. Of 48 tokens two segments are cached, whose
    # states uniform gates need the sum of alone.
    heads, key, value, layers = 6, 8, 12, 3
    state = layers * heads * key * value * 4
    sizes = (mc.nn.cache_bytes(m.init_cache(1, 48))["cached states"] for m in (uniform, content))
    assert tuple(sizes) == (state, 2 * state)
    # Beside them: float32 keys and values of 48 tokens, of two heads of each in every layer.
    table = mc.nn.cache_table(uniform, uniform.init_cache(1, 48), 48).splitlines()
    kv = 48 * 4 * (layers * (2 * key + heads * value) + 2 * 2 * 16)
    assert table[-1].split()[-2:] == [f"{kv:,}", f"{kv / 48:,.1f}"]


@pytest.mark.parametrize(
    ("name", "kind"),
    product(
        ["qwen3_5_text", "qwen3_next"],
        {"None": None, "Explicit": AxisType.Explicit, "Auto": AxisType.Auto},
        turn=0,
    ),
)
def test_parameters_are_divided_as_they_are_read(name, kind):
    devices = jax.devices()[:4]
    if kind is None:
        mesh, rules = mc.sharding.make_mesh(dict(fsdp=2, tensor=2), devices=devices), ()
    else:
        types = (kind, kind)
        mesh = jax.make_mesh((2, 2), ("rows", "model"), axis_types=types, devices=devices)
        rules = RULES
    tokens, wanted = expected(name)
    with jax.set_mesh(mesh), logical_axis_rules(rules):
        model = mc.pretrained.load(FOLDERS / name)
        kernel = model.layers[0].blocks[0].mixer.key.linear.kernel.get_value()
        assert isinstance(kernel.sharding, NamedSharding)
        _, rows, heads = kernel.sharding.spec
        assert heads in ("model", "tensor")
        assert rows is not None
        got = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
    assert_close(got, wanted, 2e-5)


def test_names_as_published_beside_those_of_the_library(tmp_path):
    """The published Kimi Linear has another name for dense MLPs than transformers saves."""
    from safetensors.numpy import load_file, save_file

    folder = FOLDERS / "kimi_linear"
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    names = {name: name.replace("0.block_sparse_moe", "0.mlp") for name in tensors}
    assert sum(new != old for old, new in names.items()) == 3
    save_file({names[name]: x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    read, expected = map(mc.pretrained.load, (tmp_path, folder))
    for x, y in zip(*map(jax.tree.leaves, map(nnx.state, (read, expected))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_tokens_give_no_logits():
    model = mc.pretrained.load(FOLDERS / "fla_rwkv7")
    assert model(jnp.zeros((1, 0), jnp.int32)).shape == (1, 0, 97)
