"""The long run: a step's time and a cache's bytes against the position."""

import json

import pytest

from tests.experiments.programs import run

pytestmark = pytest.mark.slow


def test_small(tmp_path):
    sizes = dict(length=96, attention=64, first=32, features=16, heads=2, layers=2, segment=8)
    flags = [f"--{name}={size}" for name, size in (sizes | dict(piece=32, rounds=3)).items()]
    done = run("stream", f"--workdir={tmp_path}", *flags, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "stream.json").read_text())
    assert [(row["model"], row["position"]) for row in rows] == [
        *(("SSC", n) for n in (32, 64, 96)),
        *(("logarithmic", n) for n in (32, 64, 96)),
        *(("attention", n) for n in (32, 64)),
    ]
    assert all(row["ms_per_token"] > 0 and row["bytes_made_for"] > 0 for row in rows)
    assert all(row["ms_made_for_first"] > 0 for row in rows)
    # A process with JAX has more than 50 MB, and these models next to nothing.
    peaks = [row["peak_bytes"] for row in rows]
    assert all(peak is None or 5e7 < peak < 4e9 for peak in peaks)
    assert len({peak is None for peak in peaks}) == 1  # the system tells, or does not
    assert (tmp_path / "stream.png").stat().st_size > 1000
    assert "a KV cache of this model" in done.stdout
