"""The commands that a finished run suggests apply to it."""

import sys

import pytest
from ml_collections import ConfigDict

from experiments._next import changed, suggestions

PUBLIC = ["--config=configs/pretrained.py", "--config.pretrained=M", "--config.data.files=T"]


@pytest.fixture(autouse=True)
def python(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/usr/bin/python")


def test_a_run_from_scratch():
    config = ConfigDict(dict(pretrained=None, tune="all"))
    argv = ["--config=configs/demo.py", "--workdir=runs/demo"]
    prompt, longer, files, attention = suggestions(config, "runs/demo", 240, argv)
    assert prompt.endswith("experiments.generate --workdir=runs/demo --prompt='class Stack:'")
    assert longer.endswith(" ".join([*argv, "--config.resume=True --config.steps=480"]))
    assert files.endswith(f"{argv[0]} --config.data.files=FOLDER --workdir=runs/mine")
    assert "configs/transformer_demo.py" in attention


@pytest.mark.parametrize(("tune", "other"), [("caches", "lora"), ("lora", "caches")])
def test_a_public_model(tune, other):
    config = ConfigDict(dict(pretrained="M", tune=tune))
    argv = [*PUBLIC, f"--config.tune={tune}", "--workdir=run"]
    lines = suggestions(config, "run", 1000, argv)
    assert "transformer_demo" not in "".join(lines)
    assert "class Stack" not in "".join(lines)
    *_, longer, tuned = lines
    assert longer.endswith(" ".join([*argv, "--config.resume=True --config.steps=2000"]))
    assert tuned.endswith(" ".join([*PUBLIC, f"--config.tune={other} --workdir=run_{other}"]))


def test_flags_are_replaced_in_either_form():
    argv = ["--config", "a.py", "--workdir", "x", "--config.steps=1", "--config.resume"]
    flags = {"workdir": "y", "config.steps": 2, "config.resume": True}
    assert changed(argv, flags) == [
        *("--config", "a.py", "--workdir=y", "--config.steps=2", "--config.resume=True")
    ]
