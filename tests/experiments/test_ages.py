"""Pairs of all ages asked of full caches."""

import json

import pytest

from tests.experiments.programs import run

pytestmark = pytest.mark.slow


def test_small(tmp_path):
    sizes = dict(length=256, piece=32, segment=8, slots=4, dim=16, heads=1, questions=64)
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    policies = "--policies=drop_oldest,compose_by_age"
    done = run("ages", f"--workdir={tmp_path}", *flags, policies, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "ages.json").read_text())
    assert [row["policy"] for row in rows] == ["drop_oldest", "compose_by_age"]
    for row in rows:
        assert row["ages"] == [1, 2, 4, 8, 16, 32]
        assert row["rank"][0] > 0.75  # the last segment has a state of its own
    dropped, composed = (row["rank"] for row in rows)
    assert abs(dropped[-1] - 0.5) < 0.1  # what was dropped is at chance
    assert composed[3] > dropped[3] + 0.1
    assert (tmp_path / "ages.md").read_text().count("\n") == 4
