"""Equal bytes of caches, and the study's three parts at a size of seconds."""

import contextlib

import pytest
from ml_collections import ConfigDict

from configs import frontier as configs
from experiments import frontier
from experiments._recall import recall_model
from experiments._study import Study
from memcache_jax.training.config import to_json


@pytest.fixture
def config(tmp_path):
    """Two models of one small layer, two updates each."""
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"{i} apples and {i} pears are {2 * i} fruits. " * 9)
    config = configs.get_config()
    four = config.changes["GRM, 4 keys"]
    attention = config.changes["attention"]
    with config.unlocked():
        config.changes = ConfigDict({"four keys": four, "attention": attention})
    config.update(steps=2, seeds=(0, 1), at_once=2, workers=1, batch_size=2, test_examples=4)
    config.update(vocab_size=40, train=((16, 2, 0),), test=((32, 4),), target="32/4", widths=(16,))
    config.update(num_layers=1, head_dim=8, segment=8, warmup_steps=1)
    small = dict(num_layers=1, head_dim=8, segment=8, width=16, steps=2, batch_size=2, workers=1)
    config.needles.update(small | dict(test_examples=3, seeds=(0,), train=(16,), lengths=(32, 48)))
    text, training = config.text, config.text.training
    text.update(seeds=(0,), first_bin=16, eval_length=64, eval_tokens=200, eval_batch_size=2)
    text.first.segmentation.size = 8
    training.update(steps=2, batch_size=2, sequence_length=16)
    training.model.update(num_layers=1, features=16, num_heads=1, mlp_features=0)
    training.data.update(files=(str(tmp_path / "*.txt"),), exclude=(), heldout_fraction=0.3)
    training.optimizer.warmup_steps = 1
    return config


def models(config, length=64):
    whole = recall_model(config, "ssd_grm", 16, 40)
    return frontier.models_in(whole, config.changes, config.unbounded, length)


def test_segments_of_the_smallest_size_that_fits(config):
    made = models(config)
    assert {name: model["segmentation"]["size"] for name, model in made.items()} == {
        "whole": 8,
        "four keys": 12,  # 64 numbers of state and 32 of keys in place of 8
        "attention": 1,
    }
    most = frontier._bytes(made["whole"], 64)
    four = made["four keys"]
    assert frontier._bytes(four, 64) <= most < frontier._bytes(made["attention"], 64)
    less = four | dict(segmentation={"name": "Constant", "size": 8})
    assert frontier._bytes(less, 64) > most

    config.unbounded = ()
    with pytest.raises(ValueError, match=r"attention takes [0-9,]+ bytes at 64 tokens"):
        models(config)


@pytest.mark.slow
def test_the_program(config, tmp_path):
    with contextlib.closing(Study(tmp_path / "study", config)) as study:
        frontier.program(config, study)
    recall, needles, text = (
        (tmp_path / "study" / f"{part}.md").read_text().splitlines() for part in frontier.PARTS
    )
    for table in (recall, needles, text):
        assert [line.split("|")[1].strip() for line in table[2:]] == [
            *("ssd_grm", "attention", "four keys")
        ]
    first, last = (line.split("|")[3:] for line in recall[2:4])
    assert first[0].strip() in ("0.00", "nan")
    assert last[0].strip() in ("1.00", "nan")
    assert recall[2].count("±") == 1
    assert (tmp_path / "study" / "frontier.png").stat().st_size > 5000

    again = to_json(config) | dict(parts=("nothing",))
    with pytest.raises(ValueError, match="parts must be of recall, needles, text, got nothing"):
        frontier.program(ConfigDict(again), None)
