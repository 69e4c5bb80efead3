"""Which cases of a large product ``make test`` runs; ``make test-all`` runs the rest too."""

import itertools

import pytest

from tests.cases import MEMORIES, slow_unless


def exhaustive_unless(kept):
    """Marks of a case that only the exhaustive suite runs, unless it is kept for ``make test``."""
    return () if kept else (pytest.mark.slow, pytest.mark.exhaustive)


def kept_of(cases, *kept, fast=()):
    """Named cases for ``parametrize``, or names alone: fast ones, kept ones, and exhaustive ones.

    Args:
      cases: by name.
      *kept: names of those that ``make test`` runs.
      fast: names of those that ``make test-fast`` runs too.
    """
    named = cases if isinstance(cases, dict) else {name: name for name in cases}
    marks = {name: exhaustive_unless(name in kept) or slow_unless(False) for name in named}
    marks |= dict.fromkeys(fast, ())
    return [pytest.param(x, id=name, marks=marks[name]) for name, x in named.items()]


def forms():
    """Names of rules by the form of their states, and whether writing erases."""
    groups = {}
    for name, memory in MEMORIES.items():
        groups.setdefault((memory.form, memory.form == "affine" and memory.erases), []).append(name)
    return tuple(groups.values())


def rules_of(turn):
    """One rule of each form; in the next turn the next ones, so that each rule has its own."""
    return tuple(names[turn % len(names)] for names in forms())


def rules(turn, *fast, among=None):
    """Every rule for ``parametrize``, of which this turn's are kept.

    Args:
      turn: a number of one's own for each test.
      *fast: names of those that ``make test-fast`` runs too.
      among: those that there are, if not all.
    """
    there = MEMORIES if among is None else among
    kept = (names for names in ([n for n in group if n in there] for group in forms()) if names)
    return kept_of(there, *(names[turn % len(names)] for names in kept), fast=fast)


def pairwise(cases):
    """Some of the cases, such that every two values that meet in a case meet in one of these.

    Greedy: the case in which most pairs meet that have not met so far, the first of equals.

    Args:
      cases: tuples of one length, such as a product, whose values can be compared.
    """
    cases = [tuple(case) for case in cases]
    axes = list(itertools.combinations(range(len(cases[0])), 2))

    def pairs_of(case):
        return {(i, j, case[i], case[j]) for i, j in axes}

    left, chosen = set().union(*map(pairs_of, cases)), []
    while left:
        best = max(cases, key=lambda case: len(pairs_of(case) & left))
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


def product(*axes, fast=()):
    """Every combination of named values for ``parametrize``; those beyond a cover are exhaustive.

    Args:
      *axes: names, or values by name.
      fast: tuples of names of those that ``make test-fast`` runs too; the cover has them.
    """
    named = [axis if isinstance(axis, dict) else {name: name for name in axis} for axis in axes]
    names = list(itertools.product(*named))
    kept = pairwise(names)
    params = []
    for case in names:
        marks = () if case in fast else exhaustive_unless(case in kept) or slow_unless(False)
        values = (axis[name] for axis, name in zip(named, case, strict=True))
        params.append(pytest.param(*values, id="-".join(map(str, case)), marks=marks))
    return params
