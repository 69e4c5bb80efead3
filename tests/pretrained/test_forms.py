"""Folders as they are published: models of text and images, older names, and what is refused."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.pretrained.forms import read_text_model, text_model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.read import described
from tests.cases import assert_close, with_slow
from tests.pretrained.test_read import FOLDERS, changed

PUBLISHED = Path(__file__).parents[1] / "data" / "published"
NAMES = sorted(path.name for path in PUBLISHED.iterdir())


def rewritten(tmp_path, source, tensors):
    """A copy of a folder with other tensors."""
    from safetensors.numpy import load_file, save_file

    shutil.copy(source / "config.json", tmp_path)
    save_file(tensors(load_file(source / "model.safetensors")), tmp_path / "model.safetensors")
    return tmp_path


def assert_same_model(folder, other):
    read, expected = map(mc.pretrained.load, (folder, other))
    assert read.config == expected.config
    for x, y in zip(*map(jax.tree.leaves, map(nnx.state, (read, expected))), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", with_slow(NAMES, "qwen3_5"))
def test_of_a_model_of_text_and_images_the_text_model(tmp_path, caplog, name):
    """Its logits are those of the whole model, and what is saved is a text model."""

    def with_several_tokens(read):
        extra = {f"mtp.{part}.weight": np.ones(16, np.float32) for part in ("fc", "norm")}
        return read | extra

    folder = rewritten(tmp_path, PUBLISHED / name, with_several_tokens)
    with caplog.at_level(logging.WARNING):
        model = mc.pretrained.load(folder)
    visual, several = caplog.messages
    assert visual.endswith("21 tensors model.visual.* are not of the text model, and are not read")
    assert "2 tensors mtp.*" in several
    with np.load(PUBLISHED / name / "expected.npz") as file:
        tokens, wanted = jnp.asarray(file["tokens"]), file["logits"]
    assert_close(jax.jit(lambda model, tokens: model(tokens))(model, tokens), wanted, 2e-5)
    mc.pretrained.save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == f"{name}_text"
    assert "vision_config" not in config
    caplog.clear()
    assert_same_model(tmp_path / "saved", folder)
    assert {record.getMessage().split(":")[0] for record in caplog.records} == {str(folder)}


def test_experts_in_two_tensors_as_they_are_published(tmp_path):
    def joined(read):
        for layer in range(4):
            own = f"model.language_model.layers.{layer}.mlp.experts"

            def each(part, own=own):
                return np.stack([read.pop(f"{own}.{i}.{part}_proj.weight") for i in range(5)])

            gates, ups = each("gate"), each("up")
            read[f"{own}.gate_up_proj"] = np.concatenate([gates, ups], axis=1)
            read[f"{own}.down_proj"] = each("down")
        return read

    folder = rewritten(tmp_path, PUBLISHED / "qwen3_5_moe", joined)
    assert_same_model(folder, PUBLISHED / "qwen3_5_moe")


def test_the_whole_model_says_what_its_files_tie():
    inner = dict(model_type="qwen3_5_text", tie_word_embeddings=False, dtype="bfloat16")
    outer = dict(model_type="qwen3_5", text_config=inner, tie_word_embeddings=True)
    text = text_model(Given(outer | dict(dtype="float32")))
    assert text["tie_word_embeddings"] is True
    assert text.dtype() == "bfloat16"
    outer.pop("tie_word_embeddings")
    assert text_model(Given(outer))["tie_word_embeddings"] is False


def test_nemotron_h_by_a_pattern_of_letters_and_its_older_names(tmp_path):
    given = json.loads((FOLDERS / "nemotron_h" / "config.json").read_text())
    layers = given.pop("layers_block_type")
    older = dict(n_groups="mamba_n_groups", conv_kernel="mamba_d_conv")
    older |= dict(time_step_min="mamba_dt_min", use_conv_bias="mamba_conv_bias")
    older |= dict(head_dim="attention_head_dim")
    given |= {name: given.pop(new) for new, name in older.items()}
    letters = dict(linear_attention="M", full_attention="*", mlp="-")
    given["hybrid_override_pattern"] = "".join(letters[layer] for layer in layers)
    shutil.copy(FOLDERS / "nemotron_h" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert_same_model(tmp_path, FOLDERS / "nemotron_h")
    with pytest.raises(ValueError, match=r"hybrid_override_pattern='M\?' has \?, known are M, \*"):
        text_model(Given(given | dict(hybrid_override_pattern="M?")))
    sparse = text_model(Given(given | dict(hybrid_override_pattern="ME*")))
    with pytest.raises(ValueError, match="layer 1 of layers_block_type is 'moe'"):
        described(sparse, dtype=jnp.float32, param_dtype=jnp.float32)


@pytest.mark.parametrize(
    ("name", "left_out", "published"),
    [
        ("granitemoehybrid", ("mamba_d_head",), dict(position_embedding_type="nope")),
        ("qwen3_next", ("layer_types",), dict(full_attention_interval=4)),
        ("qwen3_5_text", ("rope_parameters",), dict(rope_theta=10_000.0, rope_scaling=None)),
        ("olmo_hybrid", ("rope_parameters",), dict(rope_theta=10_000.0)),
    ],
)
def test_values_that_published_files_have_or_leave_out(name, left_out, published):
    given = read_text_model(FOLDERS / name)
    values = {key: value for key, value in given.values.items() if key not in left_out}
    dtypes = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    assert described(Given(values | published), **dtypes) == described(given, **dtypes)


def test_published_olmo_hybrid_has_no_rotary_positions():
    values = dict(read_text_model(FOLDERS / "olmo_hybrid").values)
    del values["rope_parameters"]
    for published, base in (
        (dict(rope_theta=None), None),
        (dict(rope_parameters=dict(rope_theta=None)), None),
        (dict(rope_parameters=None), 10_000.0),  # as transformers reads it
    ):
        model = described(Given(values | published), dtype=jnp.float32, param_dtype=jnp.float32)
        attention = [x for x in model.mixers if isinstance(x, mc.nn.GroupedAttentionMixer)]
        assert {mixer.rope_base for mixer in attention} == {base}


def test_mamba2_as_its_authors_package_names_it(tmp_path):
    def named(read):
        read["backbone.embedding.weight"] = read.pop("backbone.embeddings.weight")
        return read

    config = dict(
        d_model=32,
        d_intermediate=0,
        n_layer=2,
        vocab_size=90,
        ssm_cfg=dict(layer="Mamba2", headdim=8, ngroups=2, d_state=12),
        attn_layer_idx=[],
        attn_cfg={},
        rms_norm=True,
        pad_vocab_size_multiple=97,
        tie_embeddings=False,
    )
    rewritten(tmp_path, FOLDERS / "mamba2", named)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_model(tmp_path, FOLDERS / "mamba2")
    mc.pretrained.save(mc.pretrained.load(tmp_path), tmp_path / "saved")
    assert_same_model(tmp_path / "saved", FOLDERS / "mamba2")
    for wrong, message in [
        (dict(attn_layer_idx=[1]), r"attn_layer_idx=\[1\] is not supported"),
        (dict(ssm_cfg={}), "ssm_cfg: layer='Mamba1' is not supported, only 'Mamba2'"),
        (dict(ssm_cfg=3), "ssm_cfg must be an object, got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            text_model(Given(config | wrong))


def test_weights_that_are_pickles_are_not_read(tmp_path):
    shutil.copy(FOLDERS / "mamba2" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle either")
    message = "lacks model.safetensors; pytorch_model.bin is a pickle, which could run any code"
    with pytest.raises(ValueError, match=message):
        mc.pretrained.load(tmp_path)


def test_a_tied_head_that_the_file_has_as_well(tmp_path):
    def tied(read):
        read["lm_head.weight"] = read["backbone.embeddings.weight"]
        return read

    folder = changed(tmp_path, "mamba2", tied, tie_word_embeddings=True)
    embedding = mc.pretrained.load(folder).embedding.embedding[...]

    def unlike(read):
        assert not np.array_equal(read["lm_head.weight"], embedding)
        return read

    folder = changed(tmp_path, "mamba2", unlike, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight unlike backbone\.embeddings\.weight"):
        mc.pretrained.load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(model_type="qwen3_5"), "config.json has no 'text_config'"),
        (dict(model_type="qwen3_5", text_config=[]), "text_config must be an object, got"),
        (
            dict(quantization_config=dict(bits=4)),
            "{'bits': 4} is not supported",
        ),
    ],
    ids=str,
)
def test_what_is_refused_says_why(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        mc.pretrained.load(changed(tmp_path, "qwen3_5_text", **config))


def test_a_tensor_by_two_names(tmp_path):
    def twice(read):
        name = "model.norm.weight"
        return read | {name.replace("model.", "model.language_model."): read[name]}

    folder = changed(tmp_path, "qwen3_5_text", twice)
    with pytest.raises(ValueError, match="has both"):
        mc.pretrained.load(folder)
