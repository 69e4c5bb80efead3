"""Families: what docs/public_models.md says of them, its code, and options of single ones."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.pretrained.families import family_of
from memcache_jax.pretrained.forms import TEXT_OF
from memcache_jax.pretrained.given import read_given
from memcache_jax.pretrained.read import described
from tests.cases import assert_close
from tests.pretrained.test_read import FOLDERS, changed, expected

PAGE = (Path(__file__).parents[2] / "docs" / "public_models.md").read_text()


@pytest.mark.slow
def test_its_code_gives_perplexity_with_and_without_caches_and_adapters(tmp_path):
    code = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(code) == PAGE.count("```python") == 2
    tokens, logits = expected("mamba2")
    tuned = tmp_path / "tuned"
    names: dict[str, Any] = dict(folder=FOLDERS / "mamba2", tokens=tokens, tuned=tuned)
    exec(compile("\n".join(code), "public_models.md", "exec"), names)
    before, after = names["before"], names["after"]
    assert before.shape == after.shape == (tokens.shape[1] - 1,)
    np.testing.assert_allclose(before[:16], after[:16], rtol=1e-4)
    assert np.abs(before[16:] - after[16:]).max() > 1e-3
    likely = logits[:, :-1] - np.log(np.exp(logits[:, :-1]).sum(-1, keepdims=True))
    loss = -np.take_along_axis(likely, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(before, np.exp(loss.mean(0)), rtol=1e-4)
    assert names["losses"][2] < names["losses"][1] < names["losses"][0]
    after = names["perplexity_by_position"](mc.pretrained.load(tuned), tokens)
    assert np.log(after).mean() < np.log(before).mean()


def test_it_names_the_families_that_are_served():
    table = PAGE[PAGE.index("| `model_type`") : PAGE.index("For each family the tests hold")]
    cells = [row.split("|")[1] for row in table.strip().splitlines()[2:]]
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted([*mc.pretrained.FAMILIES, *TEXT_OF])


@pytest.mark.parametrize("name", ["kimi_linear", "nemotron_h"])
def test_options_that_their_library_does_not_act_on(name):
    """Their heads are never the embedding, and Nemotron-H's attention has no biases."""
    given = read_given(FOLDERS / name)
    changed = given.replaced(tie_word_embeddings=True)
    if name == "nemotron_h":
        changed = changed.replaced(attention_bias=True)
    dtypes = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    assert described(changed, **dtypes) == described(given, **dtypes)
    assert [x.names for x in family_of(changed).tensors(changed)] == [
        x.names for x in family_of(given).tensors(given)
    ]


def test_the_first_version_of_rwkv7_has_the_mixes_of_six_paths_in_one(tmp_path):
    def first_version(read):
        layers = {name.removesuffix("x_r") for name in read if name.endswith("attn.x_r")}
        for layer in layers:
            rows = [read.pop(f"{layer}x_{letter}")[0] for letter in "rwkvag"]
            read[f"{layer}x_x"] = np.concatenate(rows)
        assert layers
        return read

    folder = changed(tmp_path, "fla_rwkv7", first_version)
    read, expected = map(mc.pretrained.load, (folder, FOLDERS / "fla_rwkv7"))
    for x, y in zip(*map(jax.tree.leaves, map(nnx.state, (read, expected))), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_layers_of_attention_among_those_of_flash_linear_attention(tmp_path):
    """Of grouped heads, with biases, a window and a base of its own, as by hand."""
    from safetensors.numpy import load_file

    spec = dict(layers=[1], num_heads=4, num_kv_heads=2, qkv_bias=True, window_size=5)
    random, where = np.random.default_rng(0), "model.layers.1.attn."

    def with_attention(read):
        features = read["model.norm.weight"].size
        read = {name: x for name, x in read.items() if not name.startswith(where)}
        for letter, size in dict(q=features, k=features // 2, v=features // 2, o=features).items():
            shape = size, features
            read[f"{where}{letter}_proj.weight"] = random.normal(size=shape).astype(np.float32)
            if letter != "o":
                bias = random.normal(size=size).astype(np.float32)
                read[f"{where}{letter}_proj.bias"] = bias
        return read

    attn = spec | dict(rope_theta=50.0)
    folder = changed(tmp_path, "fla_gated_deltanet", with_attention, attn=[attn])
    read = load_file(folder / "model.safetensors")
    weights = {name.removeprefix(where): x for name, x in read.items() if name.startswith(where)}
    model = mc.pretrained.load(folder, scan_layers=False)
    period = jax.tree.map(lambda x: x[0], nnx.state(model.layers.blocks[1].mixer))
    mixer = nnx.merge(nnx.graphdef(model.layers.blocks[1].mixer), period)
    x = random.normal(size=(9, weights["o_proj.weight"].shape[1])).astype(np.float32)
    query, key, value = (
        (x @ weights[f"{a}_proj.weight"].T + weights[f"{a}_proj.bias"]).reshape(9, heads, -1)
        for a, heads in dict(q=4, k=2, v=2).items()
    )
    dim = query.shape[-1]
    angles = np.arange(9)[:, None] * 50.0 ** (-np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turned(rows):
        first, second = np.split(rows, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    ago = np.arange(9)[:, None] - np.arange(9)
    seen, heads = (ago >= 0) & (ago < 5), []
    query, key = turned(query), turned(key)
    for head in range(4):
        scores = query[:, head] @ key[:, head // 2].T / np.sqrt(dim)
        likely = np.exp(np.where(seen, scores, -np.inf))
        heads.append(likely / likely.sum(axis=-1, keepdims=True) @ value[:, head // 2])
    wanted = np.concatenate(heads, axis=-1) @ weights["o_proj.weight"].T
    assert_close(mixer(jnp.asarray(x)[None])[0], wanted, 1e-5)
    mc.pretrained.save(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == read.keys()


@pytest.mark.slow
def test_attention_between_layers_of_rwkv7_passes_on_the_values_of_the_first(tmp_path):
    """A layer between them that adds nothing leaves the logits as they were."""
    from safetensors.numpy import load_file

    random, where, size = np.random.default_rng(0), "model.layers.1.", 32

    def with_a_layer_between(read):
        read = {name.replace(where, "model.layers.2."): x for name, x in read.items()}
        hidden = read["model.layers.0.ffn.key.weight"].shape[0]
        new = {f"attn.{letter}_proj.weight": random.normal(size=(size, size)) for letter in "qkv"}
        new |= {"attn.o_proj.weight": np.zeros((size, size)), "ffn.x_k": random.normal(size=size)}
        new |= {"ffn.key.weight": random.normal(size=(hidden, size))}
        new |= {"ffn.value.weight": np.zeros((size, hidden))}
        for norm in ("attn_norm", "ffn_norm"):
            new |= {f"{norm}.{part}": random.normal(size=size) for part in ("weight", "bias")}
        return read | {f"{where}{name}": x.astype(np.float32) for name, x in new.items()}

    attn = dict(layers=[1], num_heads=4)
    options: dict[str, Any] = dict(num_hidden_layers=3, value_dim=size, attn=attn)
    folder = changed(tmp_path, "fla_rwkv7", with_a_layer_between, **options)
    model, (tokens, wanted) = mc.pretrained.load(folder), expected("fla_rwkv7")
    one_pass = jax.jit(lambda model, tokens: model(tokens))
    assert_close(one_pass(model, tokens), wanted, 2e-5)
    mc.pretrained.save(model, tmp_path / "saved")
    saved, read = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", folder))
    jax.tree.map(np.testing.assert_array_equal, saved, read)

    @jax.jit
    def stream(model, tokens):
        first, cache = model.extend(tokens[:, :7], model.init_cache(*tokens.shape))
        rest, _ = model.extend(tokens[:, 7:], cache)
        return model.logits(jnp.concatenate([first, rest], axis=1))

    out = mixer_of(model, 1).out.kernel
    out.set_value(jnp.asarray(random.normal(size=out.shape), out.dtype))
    logits = one_pass(model, tokens)
    assert np.abs(logits - wanted).max() > 0.1
    assert_close(stream(model, tokens), logits, 2e-5)


def mixer_of(model, layer):
    """The mixer of a model whose layers repeat nowhere."""
    stacks = model.layers if isinstance(model.layers, nnx.List) else [model.layers]
    blocks = [block for stack in stacks for block in stack.blocks]
    return blocks[layer].mixer
