"""What tokens read: the numbers of a model, and the page made of them."""

import base64
import html
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from experiments._gates_page import as_json, page
from experiments._reads import inspect, pieces
from memcache_jax.training import default_config, train
from memcache_jax.training.tokenizers import ByteTokenizer
from tests.browser import browser
from tests.experiments.programs import run

TEXT = "if a < b:  # né & </script><b>\n    swap(a, b)\n" * 2


def model_of(*mixers):
    config = mc.nn.LanguageModelConfig(
        vocab_size=257,
        num_layers=2 * len(mixers),
        features=16,
        num_heads=2,
        mixers=mixers,
        mlp_features=0,
    )
    return mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))


def caching(aggregation, segmentation):
    return mc.nn.MemoryCachingMixer(mc.memories.LinearAttention(), aggregation, segmentation)


@pytest.fixture(scope="module")
def found():
    """What SSC over segments of 8 reads, attention, and GRM over logarithmic ones beside SSC."""
    model = model_of(
        caching(mc.SSC(top_k=2), mc.Constant(8)),
        mc.nn.AttentionMixer(),
        mc.nn.ParallelMixer(
            caching(mc.GRM(), mc.Logarithmic(16)), caching(mc.SSC(top_k=2), mc.Constant(8))
        ),
    )
    tokenizer = ByteTokenizer()
    return inspect(model, tokenizer, tokenizer.encode(TEXT.encode()))


def test_borders_that_depend_on_the_text_are_refused():
    model = model_of(caching(mc.GRM(), mc.Adaptive(8, 16)))
    with pytest.raises(ValueError, match="depend on the text, and are not shown"):
        inspect(model, ByteTokenizer(), np.arange(3))


@pytest.mark.slow
def test_gates_are_of_the_states_that_a_token_can_read(found):
    assert "".join(found["tokens"]) == TEXT
    assert [layer["name"].split(":")[0] for layer in found["layers"]] == [
        *("layer 0", "layer 2 left", "layer 2 right"),
        *("layer 3", "layer 5 left", "layer 5 right"),
    ]
    tokens = np.arange(len(TEXT.encode()))
    for layer in found["layers"]:
        cached, live = layer["gates"][..., :-1], layer["gates"][..., -1]
        np.testing.assert_allclose(cached.sum(axis=-1) + live, 1, atol=1e-6)
        _, end = np.transpose(layer["states"])
        over = end[None] <= tokens[:, None]
        assert np.all(np.where(over[:, None], 0, cached) == 0)
        read = (cached > 0).sum(axis=-1)
        if "SSC" in layer["name"]:
            np.testing.assert_array_equal(read, np.minimum(tokens // 8, 2)[:, None].repeat(2, 1))
        else:  # a bucket for each bit of the block's number
            bits = [int(t // 16).bit_count() for t in tokens]
            np.testing.assert_array_equal(read, np.array(bits)[:, None].repeat(2, 1))


def test_page(found):
    text = page(found, "a <title>")
    for layer in found["layers"]:
        assert f"<h2>{html.escape(layer['name'])}</h2>" in text
    assert "a &lt;title&gt;" in text
    assert text.count("<b>") == 6 * 2  # the heads' names, none of the text
    assert text.count("</script>") == 2
    assert "http" not in text
    spans = re.search(r'<div id="text"[^>]*>(.*?)</div>', text, re.S)
    assert spans is not None
    assert spans[1].count("<span") == len(TEXT.encode())
    numbers = re.search(r'id="data">(.*?)</script>', text, re.S)
    assert numbers is not None
    for shown, layer in zip(json.loads(numbers[1]), found["layers"], strict=True):
        gates = np.frombuffer(base64.b64decode(shown["gates"]), np.uint8)
        gates = gates.reshape(layer["gates"].shape)
        assert np.abs(gates / 255 - layer["gates"]).max() <= 1 / 255
        np.testing.assert_array_equal(gates > 0, layer["gates"] > 0)
    stored = json.loads(as_json(found))
    assert np.abs(np.array(stored["layers"][2]["gates"]) - found["layers"][2]["gates"]).max() < 1e-4


@pytest.fixture
def opened(tmp_path):
    """A page of twelve tokens in segments of four, in a browser, with what it asks for and logs."""
    gates = np.ones((12, 2, 3), np.float32) * [0.2, 0.3, 0.5]
    name = "layer 0: LinearAttention, GRM(gate=" + "a_long_name" * 9
    layer = dict(name=name, states=[[0, 4], [4, 8]], begin=[0, 4, 8], gates=gates)
    pieces = ["word "] * 5 + ["\n"] + ["long" * 99] + ["word "] * 5
    file = tmp_path / "inspect.html"
    file.write_text(page(dict(tokens=pieces, layers=[layer]), "a text"))
    with browser() as chromium:
        yield chromium.open(file.as_uri())


@pytest.mark.slow
def test_page_in_a_browser(opened):
    tab, seen = opened
    where = tab.locator("#where")
    assert where.inner_text() == 'token 11, "word "'
    # With the keyboard alone.
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowLeft")
    assert where.inner_text().startswith("token 10,")
    tab.keyboard.press("Home")
    assert where.inner_text().startswith("token 0,")
    tab.keyboard.press("ArrowDown")
    assert where.inner_text().startswith("token 6,")
    tab.keyboard.press("Enter")
    tab.locator("#text span").nth(2).hover()
    assert where.inner_text().startswith("token 6,"), "a token that is kept stays"
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Enter")
    assert tab.locator("#head-0-0").get_attribute("aria-pressed") == "true"
    assert tab.locator("#head-0-1").get_attribute("aria-pressed") == "false"
    # With the mouse, and on a telephone.
    tab.locator("#text span").nth(6).click()
    tab.locator("#text span").nth(2).hover()
    assert where.inner_text().startswith("token 2,")
    tab.set_viewport_size(dict(width=360, height=640))
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert seen.requests == [tab.url]
    assert seen.errors == []


def test_a_character_is_shown_at_its_last_token():
    tokenizer = ByteTokenizer()
    assert pieces(tokenizer, tokenizer.encode("né€".encode())) == ["n", "", "é", "", "", "€"]
    assert pieces(tokenizer, tokenizer.encode("a€".encode()[:-1])) == ["a", "", "\ufffd"]


@pytest.mark.parametrize(
    ("mixer", "tokens", "message"),
    [
        (mc.nn.AttentionMixer(), [1], "no memory caching: its mixers are"),
        (caching(mc.Residual(), mc.Constant(8)), [1], "Residual reads all states alike"),
        (caching(mc.GRM(), mc.Constant(8)), [], "the text has no tokens"),
    ],
)
def test_errors(mixer, tokens, message):
    with pytest.raises(ValueError, match=message):
        inspect(model_of(mixer), ByteTokenizer(), np.array(tokens, np.int32))


@pytest.mark.slow
def test_command(tmp_path, trained_run):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    for i in range(4):
        (tmp_path / f"corpus{i}.txt").write_text(TEXT * 5)
    config = default_config()
    config.steps, config.batch_size, config.sequence_length = 1, 1, 16
    config.model.update(num_layers=1, features=16, num_heads=2, mlp_features=16)
    config.model.mixers = ("attention",)
    config.data.files = (str(tmp_path / "corpus*.txt"),)
    config.data.heldout_fraction, config.data.heldout_tokens = 0.3, 16
    config.optimizer.warmup_steps, config.sample.max_new_tokens = 0, 0
    train(config, tmp_path / "run")
    jax.clear_caches()

    flags = f"--text={text}", "--max_tokens=20"
    done = run("inspect", f"--workdir={trained_run}", f"--output={tmp_path}/read", *flags)
    assert done.returncode == 0, done.stderr
    assert "layer 0: LinearAttention, GRM" in done.stdout
    assert "<span>&lt;</span>" in (tmp_path / "read" / "inspect.html").read_text()
    assert (tmp_path / "read" / "inspect.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "read" / "inspect.json").read_text())
    assert np.shape(stored["layers"][0]["gates"]) == (20, 2, 3)
    done = run("inspect", f"--workdir={tmp_path}/run", *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the model has no memory caching")
