"""What memories hold without training: the theory, exact rules, caches, and the program."""

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from configs import capacity as configs
from experiments import _borders, _capacity, capacity
from experiments._study import Study

DIM, PAIRS, TRIALS = 8, 32, 24
RULES = _capacity.rules()
ASKED = _capacity.draw_questions(1, TRIALS, PAIRS, 8, 32)


def measured(rule, kind, segment, pairs, asked=ASKED):
    keys, values = pairs
    return _capacity.measure_memory(
        RULES[rule], kind, segment, keys, values, asked, temperature=10.0
    )


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_a_linear_memory_has_the_noise_of_theory(correlation):
    pairs = _capacity.draw_pairs(0, 64, PAIRS, DIM, correlation, 0)
    asked = _capacity.draw_questions(1, 64, PAIRS, 8, 64)
    row = measured("LinearAttention", mc.Residual(), None, pairs, asked)
    theory = _capacity.linear_snr(_capacity.points(PAIRS, asked), DIM, correlation)
    np.testing.assert_allclose(row["snr"], theory, rtol=0.15)


def test_products_of_keys_are_as_stated():
    keys, values = _capacity.draw_pairs(0, 64, 16, DIM, 0.5, 4)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(values, axis=-1), 1, rtol=1e-5)
    products = np.einsum("tik,tjk->tij", keys, keys).mean(axis=0)
    same = np.kron(np.eye(4), np.ones((4, 4))) - np.eye(16) > 0
    np.testing.assert_allclose(products[same].mean(), 0.5, atol=0.02)
    np.testing.assert_allclose(products[~same & ~np.eye(16, dtype=bool)].mean(), 0, atol=0.03)


def test_a_delta_rule_recalls_orthogonal_keys_exactly():
    random = np.random.default_rng(0)
    keys = np.linalg.qr(random.standard_normal((TRIALS, DIM, DIM)))[0].astype(np.float32)
    _, values = _capacity.draw_pairs(0, TRIALS, DIM, DIM, 0.0, 0)
    asked = _capacity.draw_questions(1, TRIALS, DIM, 4, 16)
    rule = dataclasses.replace(RULES["DeltaNet"], controls=dict(beta=1.0))
    row = _capacity.measure_memory(
        *(rule, mc.Residual(), None, keys, values, asked), temperature=1.0
    )
    assert row["recall"] == [1.0, 1.0]
    assert min(row["snr"]) > 1e9


def test_more_segments_recall_more():
    pairs = _capacity.draw_pairs(0, TRIALS, PAIRS, DIM, 0.5, 8)
    (alone, cached) = (
        measured("LinearAttention", mc.GRM(pooling="sum"), segment, pairs) for segment in (None, 8)
    )
    assert cached["recall"][0] == alone["recall"][0]  # one segment
    assert cached["recall"][-1] > alone["recall"][-1] + 0.1
    one = 4 * DIM * DIM
    assert alone["bytes"] == [one] * 4
    assert cached["bytes"] == [one + i * (one + 4 * DIM) for i in range(4)]


def test_the_router_finds_what_it_reads():
    keys, _ = _capacity.draw_pairs(0, TRIALS, PAIRS, DIM, 0.5, 8)
    one, all_of_them = (_capacity.router_hits(keys, ASKED, k) for k in (1, 3))
    assert one[0] == one[1] == 1.0
    assert 0.5 < one[-1] < 1
    assert all_of_them == [1.0] * 4
    # Segments of one pair: a key's own pooled key is the nearest to it.
    single = _capacity.draw_questions(1, TRIALS, PAIRS, 1, 4)
    assert _capacity.router_hits(keys, single, 1)[:-1] == [1.0] * (PAIRS - 1)


def test_more_keys_of_a_state_find_more():
    keys, values = _capacity.draw_pairs(0, TRIALS, PAIRS, DIM, 0.0, 0)
    one, two, each = (_capacity.router_hits(keys, ASKED, 1, count)[-1] for count in (1, 2, 8))
    assert one < two < each == 1.0

    # The layer reads what the router finds: with the last questions of a segment.
    kind = mc.SSC(top_k=1, pooling="sum", num_keys=8)
    found = measured("DeltaNet", kind, 8, (keys, values))
    lost = measured("DeltaNet", dataclasses.replace(kind, num_keys=1), 8, (keys, values))
    assert found["recall"][-1] > lost["recall"][-1] + 0.1
    one = 4 * DIM * DIM
    assert found["bytes"] == [one + i * (one + 8 * 4 * DIM) for i in range(4)]


def test_reads_are_judged_by_angle():
    _, values = _capacity.draw_pairs(0, TRIALS, PAIRS, DIM, 0.0, 0)
    exact = values[np.arange(TRIALS)[:, None, None], ASKED]
    row = _capacity.quality(3 * exact, values, ASKED)
    assert row["recall"] == [1.0] * 4
    assert min(row["snr"]) > 1e9
    other = values[np.arange(TRIALS)[:, None, None], (ASKED + 1) % 8]
    assert _capacity.quality(other, values, ASKED)["recall"][0] == 0


def test_segments_end_at_questions():
    pairs = _capacity.draw_pairs(0, TRIALS, PAIRS, DIM, 0.0, 0)
    with pytest.raises(ValueError, match="got 16 and 8"):
        measured("SSD", mc.Residual(), 16, pairs)
    with pytest.raises(ValueError, match="7 must divide"):
        _capacity.draw_questions(1, TRIALS, PAIRS, 7, 4)


@pytest.mark.slow
def test_program(tmp_path):
    config = configs.get_config()
    config.pairs, config.trials, config.questions, config.dim = 32, 2, 8, 8
    config.rules = config.cached_rules = ("SSD",)
    config.aggregations, config.segments, config.top_k = ("SSC",), (16,), (1,)
    config.report = 16
    config.num_keys, config.router_pairs = (1, 2), 64
    config.trees, config.tree_states, config.tree_trials = ((2, 2), (2, 8)), (16,), 2
    config.recall_borders = config.recall_borders[-1:]
    with contextlib.closing(Study(tmp_path, config)) as study:
        capacity.program(config, study)
        rows = study.measure(capacity.groups(config), lambda cases: pytest.fail("again"))
    borders = (tmp_path / "borders.md").read_text()
    assert "Adaptive(min=8, max=32, threshold=0.5, block=4, by='keys')" in borders
    recall = (tmp_path / "recall.md").read_text()
    assert "Adaptive(min=8, max=32, threshold=0.3, block=2, by='errors')" in recall
    assert len(rows) == 4 * 3
    table = (tmp_path / "table.md").read_text()
    assert "SSD, SSC(k = 1), C = 16" in table
    assert "SSD, SSC(k = 1), 2 keys, C = 16" in table
    # Each number of keys that divides 16, with each k; each key by itself is found.
    router = (tmp_path / "router.md").read_text().splitlines()[2:]
    assert len(router) == 5 * 2
    assert router[-1].split()[1::2] == ["16", "16", "4", "1.00", "1.00", "1.00"]
    # A tree compares fewer keys; with a beam that holds all nodes it finds as much as all keys.
    every, narrow, whole = (
        [cell.strip() for cell in line.split("|")[2:-2]]
        for line in (tmp_path / "tree.md").read_text().splitlines()[2:]
    )
    assert [row[1] for row in (every, narrow, whole)] == ["16", "14", "16"]
    assert every[2:] == whole[2:]
    assert "attention" in table
    assert (tmp_path / "capacity.png").stat().st_size > 10_000
    # Attention, then the rule alone: which has no router, and holds less.
    assert rows[0]["recall"][-1] > rows[3]["recall"][-1]
    assert [("found" in row) for row in rows] == [False] * 6 + [True] * 6


def test_segments_that_follow_topics_are_found_more_often():
    keys, topic = _borders.draw_topics(0, 8, 256, 8, 0.6, (8, 24))
    assert set(np.bincount(topic[0])[:-1].tolist()) <= set(range(8, 25))
    ideal, follows, fixed = (
        _borders.measure_router(segmentation, keys, topic)
        for segmentation in (None, mc.Adaptive(8, 24, 0.6, block=2), mc.Constant(12))
    )
    assert ideal["found"] > follows["found"] > fixed["found"] + 0.05
    assert follows["segments"] < fixed["segments"] == 22
    # A constant segmentation's numbers are those of its blocks.
    segment = _borders.segments_of(mc.Constant(12), keys)
    np.testing.assert_array_equal(segment[0], np.arange(256) // 12)


def test_a_state_for_each_topic_recalls_what_is_a_map_of_the_keys():
    keys, topic = _borders.draw_topics(0, 4, 64, 8, 0.5, (12, 20))
    values = _borders.draw_values(1, keys, topic, mapped=True)
    np.testing.assert_allclose(np.linalg.norm(values, axis=-1), 1, rtol=1e-5)
    asked = np.random.default_rng(2).integers(0, 64, (4, 16))
    ideal, fixed = (
        _borders.measure_recall(segmentation, keys, values, topic, asked, 1.0, 10.0)
        for segmentation in (None, mc.Constant(32))
    )
    assert ideal["recall"] > fixed["recall"] + 0.2
    assert ideal["segments"] == topic[:, -1].mean() + 1
    assert fixed["segments"] == 2


def test_unknown_names():
    config = configs.get_config()
    config.cached_rules = ("Nothing",)
    with pytest.raises(ValueError, match="got Nothing"):
        capacity.groups(config)
    config.cached_rules, config.report = (), 24
    with pytest.raises(ValueError, match="must divide report, 24, and pairs, 256, got 16"):
        capacity.groups(config)
    with pytest.raises(ValueError, match="got Mean"):
        capacity.aggregation("Mean", None)
    with pytest.raises(ValueError, match="got Often"):
        capacity.segmentation(dict(name="Often"))


def test_every_rule_has_coefficients():
    assert {*RULES, "Vector"} == {
        name for name in mc.memories.__all__ if name not in ("Control", "DeepMemory", "Memory")
    }
    for rule in RULES.values():
        made = rule.coefficients(jnp.zeros((1, 2, 3, DIM)))
        assert set(made) == {n for n, c in rule.memory.controls.items() if not c.optional}
