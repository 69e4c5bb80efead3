"""What ``make test`` leaves to ``make test-all``: no pair of values, no contract and no rule."""

import collections
import importlib
import inspect
import itertools
import re
from pathlib import Path

import pytest

from tests.cases import COVER, MEMORIES
from tests.covers import each_value, first_kept, forms, kept_of, pairwise, product, rules


def met(cases):
    """Every two values of two axes that meet in a case."""
    return {
        pair for case in cases for pair in itertools.combinations([*enumerate(case)], 2)
    }  # each with the number of its axis


@pytest.mark.parametrize(
    ("sizes", "most"), [((3, 3, 3), 10), ((4, 2, 3, 2), 14), ((15, 2), 30), ((5, 1, 4), 20)]
)
def test_every_pair_of_a_product_meets_in_its_cover(sizes, most):
    cases = [*itertools.product(*map(range, sizes))]
    chosen = pairwise(cases)
    assert met(chosen) == met(cases)
    assert len(set(chosen)) == len(chosen) <= most
    assert set(chosen) <= set(cases)
    assert pairwise(cases) == chosen


def test_pairs_that_never_meet_are_not_wanted():
    cases = [("a", 1, "x"), ("a", 2, "x"), ("b", 1, "y")]
    assert sorted(pairwise(cases)) == cases
    assert pairwise([("a", 1)]) == [("a", 1)]


def names_of(param):
    return {mark.name for mark in param.marks}


def test_marks_of_a_product():
    params = product("abc", dict(one=1, two=2), [3, 4, 5], fast=[("a", "one", 3)])
    assert len(params) == 18
    assert params[0].values == ("a", 1, 3)
    assert (params[0].id, names_of(params[0])) == ("a-one-3", set())
    kept = [p.id.split("-") for p in params if "exhaustive" not in names_of(p)]
    assert met(kept) == met([p.id.split("-") for p in params])
    assert len(kept) < 12
    assert all("slow" in names_of(p) for p in params[1:])


def test_marks_of_names():
    params = kept_of(["a", "b", "c"], "b", fast=["a"])
    assert [names_of(p) for p in params] == [set(), {"slow"}, {"slow", "exhaustive"}]


@pytest.mark.parametrize("sizes", [(3, 2), (5, 2), (3, 3), (4, 3)])
def test_over_the_turns_every_two_values_meet(sizes):
    axes = [*map(range, sizes)]
    turns = [each_value(turn, axes) for turn in range(max(sizes))]
    for cases in turns:
        assert len(cases) == max(sizes)
        assert [{*values} for values in zip(*cases, strict=True)] == [{*axis} for axis in axes]
    assert met(itertools.chain(*turns)) == met(itertools.product(*axes))


def test_marks_of_rows():
    params = first_kept(1, [("a", 1), ("b", 2)]) + first_kept(1, dict(x=3, y=4))
    assert [p.values for p in params] == [("a", 1), ("b", 2), (3,), (4,)]
    assert ["exhaustive" in names_of(p) for p in params] == [False, True] * 2
    assert [p.id for p in params] == [None, None, "x", "y"]


def test_each_turn_has_every_form_and_every_rule_has_its_turn():
    kept = [
        {p.id for p in rules(turn, among=among) if "exhaustive" not in names_of(p)}
        for among in (MEMORIES, COVER)
        for turn in range(5)
    ]
    assert all([len(names & {*form}) for form in forms()] == [1] * 4 for names in kept)
    assert set().union(*kept[:5]) == MEMORIES.keys()
    assert set().union(*kept[5:]) == COVER.keys()
    assert rules(0, values=True)[1].values == (MEMORIES["retnet"],)


def test_only_cases_are_exhaustive():
    for file in Path(__file__).parents[1].rglob("test_*.py"):
        marked = re.search(r"^( *@|pytestmark).*mark\.exhaustive", file.read_text(), re.MULTILINE)
        assert not marked or "parametrize" in marked[0], (file, marked[0])
    for all_left_out in (lambda: kept_of(["a"]), lambda: first_kept(0, ["a"])):
        with pytest.raises(AssertionError, match="make test runs no case"):
            all_left_out()


def contracts():
    """(name, its cases by id with the names of their marks) of every parametrized contract."""
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.contracts.{file.stem}")
        of_module = {mark.name for mark in _marks(module)}
        for owner in (module, *(x for _, x in inspect.getmembers(module, inspect.isclass))):
            for name, function in inspect.getmembers(owner, inspect.isfunction):
                if not name.startswith("test_") or function.__module__ != module.__name__:
                    continue
                marks = _marks(function) + _marks(owner if owner is not module else None)
                of_all = of_module | {m.name for m in marks if m.name != "parametrize"}
                for mark in marks:
                    if mark.name == "parametrize":
                        yield f"{file.stem}::{name}", of_all, [*mark.args[1]]


def _marks(holder):
    marks = getattr(holder, "pytestmark", [])
    return [getattr(m, "mark", m) for m in (marks if isinstance(marks, list) else [marks])]


@pytest.mark.slow
def test_no_contract_and_no_rule_is_left_out():
    rules_met = collections.Counter()
    for contract, of_all, params in contracts():
        params = [p if hasattr(p, "marks") else pytest.param(p) for p in params]
        here = [p for p in params if not {"exhaustive"} & (names_of(p) | of_all)]
        assert here, f"make test runs no case of {contract}"
        for p in params:
            marks = names_of(p) | of_all
            assert "slow" in marks or "exhaustive" not in marks, (contract, p.id)
        there = {x for p in here for x in (p.id, *p.values) if isinstance(x, str)}
        rules_met.update(there & MEMORIES.keys())
    assert min(rules_met[name] for name in MEMORIES) >= 4, rules_met
