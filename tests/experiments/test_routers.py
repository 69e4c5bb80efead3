"""The share of questions for which routers find the state, and the study's table."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import routers as configs
from experiments import routers
from experiments._fit import Recipe, Replica, fit
from experiments._mqar import on_device, zoology
from experiments._recall import model_and_cache, recall_model
from experiments._routers import found
from experiments._study import Study

PAIRS, LENGTH, SIZE = 4, 32, 4


@pytest.fixture
def config():
    config = configs.get_config()
    config.update(steps=2, seeds=(0,), at_once=1, workers=1, batch_size=2, test_examples=4)
    config.update(vocab_size=40, train=((16, 2, 0),), test=((LENGTH, PAIRS),), widths=(16,))
    config.update(num_layers=2, head_dim=8, segment=SIZE, top_k=1, warmup_steps=1)
    return config


@pytest.mark.slow
def test_a_router_finds_the_segment_of_the_pair(config):
    model, _ = model_and_cache(recall_model(config, "ssd_ssc", 16, 40))
    source = on_device(16, 2, vocab_size=40)
    recipe = Recipe(steps=1, batch_size=2, router_noise=0.5, router_loss=0.1)
    fitted = fit(model, [source], [Replica(0, 1e-2)], recipe)
    questions = zoology(LENGTH, PAIRS, vocab_size=40, examples=6, seed=0)
    hits, asked = np.zeros(2), 0
    trained = nnx.merge(fitted.graph, jax.tree.map(lambda x: x[0], fitted.params))
    gates = trained.gates(jnp.asarray(questions.tokens))
    for row, places in enumerate(questions.places):
        for place in places:
            pair = list(questions.tokens[row, : 2 * PAIRS : 2]).index(questions.tokens[row, place])
            segment = (2 * pair + 1) // SIZE
            asked += segment < place // SIZE
            for layer in range(2):
                hits[layer] += (gates[layer][row, place, :, segment] > 0).any()
    assert 0 < hits.min() < asked
    np.testing.assert_allclose(found(fitted, questions), [hits / asked], atol=1e-4)


@pytest.mark.slow
def test_the_program(config, tmp_path, monkeypatch):
    """Its table of made-up results; the measurement has its own test."""

    def measured(cases):
        assert [sorted(case["router"]) for case in cases] == [["router_loss", "router_noise"]]
        share = 0.5 + cases[0]["router"]["router_noise"]
        key = f"{LENGTH}/{PAIRS}"
        return [dict(accuracy={key: share}, found={key: [0.25, share]})]

    monkeypatch.setattr(routers, "measure_recall", measured)
    with contextlib.closing(Study(tmp_path, config)) as study:
        routers.program(config, study)
    rows = [line.split("|")[1:-1] for line in (tmp_path / "table.md").read_text().splitlines()]
    assert sorted([cell.strip() for cell in row] for row in rows[2:]) == [
        ["both", "1.000", "0.250", "1.000"],
        ["loss", "0.500", "0.250", "0.500"],
        ["neither", "0.500", "0.250", "0.500"],
        ["noise", "1.000", "0.250", "1.000"],
    ]
