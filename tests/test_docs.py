"""The classes of docs/write_your_own_parts.md run on every path, and its code as it stands."""

import importlib.util
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.gating import GATES
from memcache_jax.streaming.eviction import POLICIES
from tests.cases import MEMORIES, assert_close, make_inputs

pytestmark = pytest.mark.slow

FOLDER = pathlib.Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """What the page defines, after all its code has run."""
    page = (FOLDER / "write_your_own_parts.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert len(blocks) == page.count("```python")
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks), "write_your_own_parts.md", "exec"), names)
    return names


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_aggregations_over_a_mesh(parts, exchange):
    aggregation = parts["TwoHops"](gate=parts["Recency"]())
    how: dict[str, Any] = dict(
        memory=MEMORIES["titans"], aggregation=aggregation, segmentation=mc.Constant(4)
    )
    assert_same_over_a_mesh(how, exchange=exchange)


def test_a_segmentation_over_a_mesh(parts):
    window = parts["Window"](4, count=3)
    assert_same_over_a_mesh(
        dict(memory=MEMORIES["linear"], aggregation=mc.GRM(), segmentation=window)
    )


def assert_same_over_a_mesh(how, **options):
    inputs = jax.tree.map(jnp.asarray, make_inputs(how["memory"], 30, batch=1, dtype=np.float32))
    wanted = jax.jit(lambda inputs: mc.memory_caching(**inputs, **how))(inputs)
    with jax.set_mesh(mc.sharding.make_mesh(dict(seq=2), devices=jax.devices()[:2])):
        run = jax.jit(lambda inputs: mc.memory_caching(**inputs, **how, **options))
        assert_close(run(inputs), wanted, 1e-5)


@pytest.mark.parametrize("name", ["Window", "Growing"])
def test_segmentations_of_packed_documents(parts, name):
    inputs = jax.tree.map(jnp.asarray, make_inputs(MEMORIES["linear"], 30, dtype=np.float32))
    segmentation = parts["Window"](4, count=3) if name == "Window" else parts["Growing"](4)

    @jax.jit
    def both(inputs, documents):
        how: dict[str, Any] = dict(
            memory=MEMORIES["linear"], aggregation=mc.GRM(), segmentation=segmentation
        )
        return [
            mc.memory_caching(**inputs, **how, document_ids=documents, implementation=path)
            for path in (None, "reference")
        ]

    got, wanted = both(inputs, jnp.asarray([[0] * 15 + [1] * 15] * 2))
    assert_close(got, wanted, 1e-5)


def test_parts_by_name(parts, monkeypatch):
    monkeypatch.setitem(GATES, "recency", parts["Recency"]())
    monkeypatch.setitem(POLICIES, "thin_out", parts["ThinOut"]())
    assert mc.GRM(gate="recency").relevance == parts["Recency"]()
    for segment in ("Window", "Growing", "TwoHops"):
        monkeypatch.setattr(mc, segment, parts[segment], raising=False)
    from memcache_jax.training import default_config, model_config

    options = default_config().model
    options.aggregation = {"name": "TwoHops", "gate": "recency"}
    options.segmentation = {"name": "Window", "size": 64, "count": 3}
    mixer: Any = model_config(options).mixers[0]
    assert mixer.aggregation == parts["TwoHops"](gate="recency")
    assert mixer.segmentation == parts["Window"](64, count=3)

    mixer = mc.nn.MemoryCachingMixer(MEMORIES["linear"], mixer.aggregation, mc.Constant(4))
    model = mc.nn.LanguageModel(
        mc.nn.LanguageModelConfig(11, num_layers=1, features=8, num_heads=2, mixers=(mixer,)),
        rngs=parts["nnx"].Rngs(0),
    )
    tokens = mc.generate(
        model,
        jnp.ones((1, 20), int),
        max_new_tokens=4,
        temperature=0.0,
        cache=dict(max_segments=3, policy="thin_out"),
    )
    assert tokens.shape == (1, 24)


def test_the_growing_segments_span_what_they_say(parts):
    growing = parts["Growing"](4)
    for segments in range(1, 6):
        plan = growing.plan(growing.span(segments))
        assert len(np.unique(plan.first)) == segments
        assert len(np.unique(growing.plan(growing.span(segments) + 1).first)) == segments + 1


@pytest.mark.parametrize("name", ["hosts.md", "serving.md"])
def test_the_code_of_a_page(name):
    blocks = re.findall(r"^```python\n(.*?)^```$", (FOLDER / name).read_text(), re.M | re.S)
    exec(compile("".join(blocks), name, "exec"), {})


@pytest.fixture(scope="module")
def pictures() -> Any:
    """The program that draws the pages' pictures."""
    spec = importlib.util.spec_from_file_location("pictures", FOLDER / "_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_show_their_tables(pictures):
    by_test, _, *_ = pictures.recall().axes
    attention = by_test.lines[-1]
    assert attention.get_label() == "attention"
    np.testing.assert_allclose(attention.get_ydata(), [1, 0.985, 1])
    (loss,) = pictures.extrapolate().axes
    titans = loss.lines[0]
    assert titans.get_xdata().tolist() == [48, 96, 192, 384, 768, 1536]
    assert titans.get_ydata().tolist() == [2.242, 1.937, 2.262, 2.084, 2.092, 2.355]
    ssd, delta = pictures.growth().axes
    assert ssd.lines[0].get_ydata().tolist() == [177, 121]
    assert delta.lines[-1].get_ydata().tolist() == [342, 202]
    trained, decoded = pictures.throughput().axes
    np.testing.assert_allclose(trained.lines[-1].get_ydata(), [13200, 6500, 3900, 1400])
    assert decoded.lines[-1].get_ydata().tolist() == [0.24, 0.97]


def test_states_that_are_counted(pictures):
    attention, constant, logarithmic, routed, alone = pictures.states().axes[0].lines
    assert (attention.get_xdata()[-1], constant.get_ydata()[-1]) == (2**17, 512)
    assert logarithmic.get_ydata()[-1] == 10  # nine buckets and the live state
    assert routed.get_ydata().max() == 5
    assert alone.get_ydata().max() == 1
