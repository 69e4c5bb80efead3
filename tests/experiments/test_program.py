"""What programs tell of flags and configurations that are wrong: one line, and no traceback."""

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from absl import app, flags
from ml_collections import ConfigDict

from experiments import _program
from memcache_jax.training import train

pytestmark = pytest.mark.filterwarnings("ignore:.*load_module")

GOOD = """
from memcache_jax.training import default_config

def get_config():
    config = default_config()
    config.{change}
    return config
"""


@pytest.fixture
def start(monkeypatch, tmp_path, capsys, unchecked):
    """Runs a program with the text of its configuration; returns what it tells and returns."""

    def start(text, *arguments, debug=False):
        file = tmp_path / "config.py"
        file.write_text(text)
        argv = ["program", f"--config={file}", *arguments]
        values = flags.FlagValues()
        monkeypatch.setattr(app, "FLAGS", values)
        monkeypatch.setattr(_program, "_DEBUG", SimpleNamespace(value=debug))
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(argv)))
        config, seen = _program.ConfigFlag(values), []

        def program():
            seen.append(config.value)
            train(config.value, tmp_path / "run")

        with pytest.raises(SystemExit) as end:
            _program.run(program)
        told = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        return told.strip(), seen

    return start


@pytest.mark.parametrize(
    ("change", "wanted"),
    {
        "stepz = 3": "the configuration has the unknown key stepz; known are accumulate, ",
        "model.widow = 3": "the configuration has the unknown key model.widow; known are model.",
        "unlock(); del config.steps": "the configuration lacks the key steps",
        "unlock(); del config.model.window": "the configuration lacks the key model.window",
        "steps = True": "steps must be an integer, got True",
        "steps = None": "steps must be an integer, got None",
        "optimizer.b1 = float('inf')": "optimizer.b1 must be a finite number, got inf",
        "model.dtype = 'float8'": "model.dtype must be one of ['float32', 'bfloat16'], got",
        "model.mixers = ('mamba',)": "model.mixers must be of attention, memory_as_context",
        "model.memory = default_config().data": "model.memory.name must be one of DLA, DeltaNet",
        "model.window = -1; config.model.mixers = ('sliding_window',)": "window must be at least 1",
        "model.rope_base = 0.; config.model.mixers = ('attention',)": "rope_base must be a finite",
        "model.memory.chunk_size = 0": "chunk_size of Titans must be at least 1, got 0",
        "model.start = 'never'": "start must be one of ['independent', 'checkpoint']",
    }.items(),
)
def test_a_configuration_that_is_wrong(start, change, wanted):
    told, _ = start(GOOD.format(change=change))
    assert told.startswith(f"error: {wanted}")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("text", "arguments", "wanted"),
    [
        ("def get_config(:", (), "SyntaxError: invalid syntax"),
        ("def get_config(): return 1 / 0", (), "ZeroDivisionError: division by zero"),
        (GOOD.format(change="steps = 3"), ("--config.stepz=3",), "stepz"),
        ("def get_config(): return 3", (), "must have a function get_config that returns"),
        ("x = 3", (), "must have a function get_config that returns a ConfigDict"),
    ],
)
def test_a_file_that_has_no_configuration(start, text, arguments, wanted):
    told, _ = start(text, *arguments)
    assert told.startswith("error: ")
    assert wanted in told
    assert "\n" not in told


def test_a_configuration_may_be_a_dict(start):
    told, (config,) = start("def get_config(): return {'steps': 3, 'model': {'window': 2}}")
    assert told == "error: the configuration lacks the key accumulate"
    assert isinstance(config, ConfigDict)
    assert config.to_dict() == {"steps": 3, "model": {"window": 2}}


def test_the_configuration_of_the_file_is_that_without_flags(tmp_path, monkeypatch):
    file, values = tmp_path / "config.py", flags.FlagValues()
    file.write_text("def get_config(steps='3'): return {'steps': int(steps), 'seeds': (0,)}")
    argv = ["program", f"--config={file}:4", "--config.steps=5", "--config.seeds=a"]
    monkeypatch.setattr(sys, "argv", argv)
    config = _program.ConfigFlag(values)
    values(argv)
    assert config.value.to_dict() == dict(steps=5, seeds=("a",))
    assert config.of_file().to_dict() == dict(steps=4, seeds=(0,))


def test_what_a_program_asks_of_a_configuration_and_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(["program"]))
    monkeypatch.setattr(_program, "_DEBUG", SimpleNamespace(value=False))
    config: Any = ConfigDict(dict(width=3))
    with pytest.raises(SystemExit):
        _program.run(lambda: config.widths)
    assert capsys.readouterr().err.startswith("error: the configuration lacks the key 'widths'")
    with pytest.raises(AttributeError):  # a bug is shown as one
        _program.run(lambda: object().widths)  # pyright: ignore


def test_the_traceback_of_an_error(start, monkeypatch):
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(["program"]))
    monkeypatch.setattr(_program, "_DEBUG", SimpleNamespace(value=True))

    def program():
        raise ValueError("to be seen")

    with pytest.raises(ValueError, match="to be seen"):
        _program.run(program)


@pytest.mark.parametrize("given", ["64,abc", "0", "64,-1", "1.5", "64,,8"])
def test_a_flag_of_integers(given, monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "DEFINE_list", partial(flags.DEFINE_list, flag_values=values))
    validator = partial(flags.register_validator, flag_values=values)
    monkeypatch.setattr(flags, "register_validator", validator)
    _program.define_integers("lengths", [4096, 65536], "Tokens.")
    _program.define_integers("starts", None, "Tokens.")
    values(["program", "--lengths=64,8"])
    assert (values.lengths, values.starts) == (["64", "8"], None)
    with pytest.raises(flags.IllegalFlagValueError, match="integers of at least 1"):
        values(["program", f"--lengths={given}"])
