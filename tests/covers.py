"""Which cases of a large product ``make test`` runs; ``make test-all`` runs the rest too.

``make test`` runs a case of every test: only cases of a product are exhaustive.
"""

import itertools

import pytest

from tests.cases import MEMORIES


def exhaustive_unless(kept):
    """The marks of a case, which is exhaustive unless ``make test`` keeps it."""
    return pytest.mark.slow if kept else (pytest.mark.slow, pytest.mark.exhaustive)


def kept_of(cases, *kept, fast=()):
    """Named cases, or names alone, for ``parametrize``, marked as fast, kept or exhaustive.

    Args:
      cases: by name.
      *kept: names of those that ``make test`` runs; at least one, counting ``fast``.
      fast: names of those that ``make test-fast`` runs too.
    """
    named = cases if isinstance(cases, dict) else {name: name for name in cases}
    assert {*kept, *fast}, "make test runs no case"
    assert {*kept, *fast} <= named.keys(), (kept, fast)
    marks = {name: exhaustive_unless(name in kept) for name in named}
    marks |= dict.fromkeys(fast, ())
    return [pytest.param(x, id=name, marks=marks[name]) for name, x in named.items()]


def forms():
    """Names of rules, grouped by the form of their states and whether writing erases."""
    groups = {}
    for name, memory in MEMORIES.items():
        groups.setdefault((memory.form, memory.form == "affine" and memory.erases), []).append(name)
    return tuple(groups.values())


def rules(turn, *fast, among=MEMORIES, values=False):
    """Every rule for ``parametrize``; ``make test`` keeps one of each form, chosen by ``turn``.

    Args:
      turn: a number that differs from test to test.
      *fast: names of those that ``make test-fast`` runs too.
      among: names of the rules to take.
      values: the rules themselves, instead of their names.
    """
    groups = ([name for name in group if name in among] for group in forms())
    kept = [names[turn % len(names)] for names in groups if names]
    return kept_of({n: MEMORIES[n] if values else n for n in among}, *kept, fast=fast)


def pairwise(cases):
    """A subset of the cases with every pair of values that occurs in any of them.

    Greedy: takes the case with the most pairs not covered so far; ties go to the first.

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


def each_value(turn, axes):
    """As many cases as the longest axis has values, which together have every value.

    Another turn pairs the values differently: tests with turns of their own together cover all
    pairs, with the test itself as one of the parameters.

    Args:
      turn: a number that differs from test to test.
      axes: the values of each.
    """
    count = max(map(len, axes))
    return [
        tuple(axis[(case + turn * i) % len(axis)] for i, axis in enumerate(axes))
        for case in range(count)
    ]


def product(*axes, turn=None, fast=()):
    """Every combination for ``parametrize``; those beyond a cover are exhaustive.

    Args:
      *axes: names, or values by name.
      turn: if given, ``each_value`` makes the cover; if not, ``pairwise`` does.
      fast: tuples of names of those that ``make test-fast`` runs too.
    """
    named = [axis if isinstance(axis, dict) else {name: name for name in axis} for axis in axes]
    cases = [*itertools.product(*named)]
    kept = pairwise(cases) if turn is None else each_value(turn, [[*axis] for axis in named])
    params = []
    for case in cases:
        marks = () if case in fast else exhaustive_unless(case in kept)
        values = (axis[name] for axis, name in zip(named, case, strict=True))
        params.append(pytest.param(*values, id="-".join(map(str, case)), marks=marks))
    return params


def first_kept(count, rows):
    """Rows of arguments for ``parametrize``, named or not; the first ``count`` are kept."""
    assert count, "make test runs no case"
    named = rows.items() if isinstance(rows, dict) else ((None, row) for row in rows)
    return [
        pytest.param(
            *(row if isinstance(row, tuple) else (row,)),
            id=name,
            marks=exhaustive_unless(i < count),
        )
        for i, (name, row) in enumerate(named)
    ]
