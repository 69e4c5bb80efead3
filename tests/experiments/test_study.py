"""A study measures each case once, whatever interrupts it."""

import importlib
import json
import multiprocessing
import time

import pytest
from ml_collections import ConfigDict

from experiments import extrapolate, needle, throughput
from experiments._recall import recall_config
from experiments._study import Study, check_keys, check_kinds, markdown, mean_and_spread

CASES = [[dict(name="a", size=n)] for n in (1, 2, 3)]


def double(cases):
    return [dict(value=2 * case["size"]) for case in cases]


def fail(cases):
    if cases[0]["size"] == 3:
        raise KeyboardInterrupt
    return double(cases)


def fail_beside_a_long_one(cases):
    if cases[0]["size"] == 1:
        time.sleep(200)
    return fail([dict(size=3)])


@pytest.fixture
def study(tmp_path):
    made = Study(tmp_path / "run", ConfigDict({"x": (1, 2)}))
    yield made
    made.close()


def test_an_interrupted_study_measures_only_what_is_missing(study):
    with pytest.raises(KeyboardInterrupt):
        study.measure(CASES, fail)
    study.close()
    again, measured = Study(study.workdir, ConfigDict()), []

    def measure(cases):
        measured.extend(cases)
        return double(cases)

    rows = again.measure([*CASES, [dict(name="b", size=1), dict(name="a", size=1)]], measure)
    again.close()
    assert measured == [dict(name="a", size=3), dict(name="b", size=1)]
    assert [row["value"] for row in rows] == [2, 4, 6, 2, 2]
    assert len(json.loads((study.workdir / "results.json").read_text())) == 4


@pytest.mark.slow
def test_processes_measure_side_by_side(study):
    rows = study.measure(CASES, double, workers=2)
    assert [row["value"] for row in rows] == [2, 4, 6]


@pytest.mark.slow
def test_an_interrupted_study_leaves_no_process_behind(study):
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        study.measure(CASES, fail_beside_a_long_one, workers=2)
    assert time.monotonic() - began < 100
    assert not multiprocessing.active_children()


def test_a_workdir_belongs_to_one_process_and_to_studies(study, tmp_path):
    with pytest.raises(ValueError, match="another process is writing"):
        Study(study.workdir, ConfigDict())
    (tmp_path / "results.json").write_text('{"loss": 1}')
    with pytest.raises(ValueError, match="results of something else"):
        Study(tmp_path, ConfigDict())
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        study.measure(CASES, double, workers=0)


def test_tables():
    assert mean_and_spread([0.5]) == "0.500"
    assert mean_and_spread([0.5, 0.7]) == "0.600 ± 0.100"
    assert markdown(["a", "b"], [["x", 0.25]]).splitlines() == [
        "| a | b     |",
        "| - | ----- |",
        "| x | 0.250 |",
    ]


def test_configurations_have_the_keys_of_their_study():
    check_keys(ConfigDict({"steps": 1, "seeds": (0,)}), ("seeds", "steps"))
    with pytest.raises(ValueError, match="unknown key step; known are seeds, steps"):
        check_keys(ConfigDict({"seeds": (0,), "step": 1, "steps": 1}), ("seeds", "steps"))
    with pytest.raises(ValueError, match="lacks the key steps"):
        check_keys(ConfigDict({"seeds": (0,)}), ("seeds", "steps"))


OF_FILE = dict(
    steps=100, rate=0.1, bounded=True, name="x", seeds=(0, 1), train=((32, 8, 0), (64, 16, 0)),
    model=dict(size=8), changes=(dict(name="Constant"),), router=None, more=(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(rate=float("nan")), "rate must be a finite number, got nan"),
        (dict(bounded=2), "bounded must be True or False, got 2"),
        (dict(name=3), "name must be a string, got 3"),
        (dict(seeds=3), r"seeds must be a tuple, such as \(0, 1\), got 3"),
        (dict(seeds=(0, "a")), r"seeds\[1\] must be an integer, got 'a'"),
        (dict(seeds=(-1,)), r"seeds\[0\] must be at least 1, got -1"),
        (dict(train=(32, 8)), r"train\[0\] must be a tuple, such as \(64, 16, 0\), got 32"),
        (dict(train=((32, 8),)), r"train\[0\] must be like \(64, 16, 0\), got \(32, 8\)"),
        (dict(train=((32, None, 0),)), r"train\[0\] must be an integer, got None"),
        (dict(model=dict(size=1.5)), "model.size must be an integer, got 1.5"),
    ],
)
def test_values_are_of_the_kinds_of_the_file(change, wanted):
    with pytest.raises(ValueError, match=f"^{wanted}$"):
        check_kinds(ConfigDict(OF_FILE | change), ConfigDict(OF_FILE))


def test_what_a_file_leaves_open_may_be_anything():
    free = dict(seeds=(0, 7, 7), rate=1, changes=(dict(name="Lengths"),), router=3, more=("a",))
    check_kinds(ConfigDict(OF_FILE | free), ConfigDict(OF_FILE))
    check_kinds(ConfigDict(OF_FILE), ConfigDict(OF_FILE))


@pytest.mark.parametrize(
    "name", ["ablate", "extrapolate", "mqar", "needle", "recall", "routers", "throughput"]
)
def test_every_configuration_in_the_folder_has_the_keys_of_its_program(name):
    keys = {
        "ablate": (*recall_config(), "changes"),
        "extrapolate": extrapolate.KEYS,
        "needle": needle.needle_config().keys(),
        "routers": (*recall_config(), "variants"),
        "throughput": throughput.KEYS,
    }
    check_keys(
        importlib.import_module(f"configs.{name}").get_config(), keys.get(name, recall_config())
    )
