"""The growth of a block's time with the length: what a row and a ratio say."""

import json

import pytest

from tests.experiments.programs import run

SIZES = dict(features=8, heads=2, segment=4, top_k=2, rounds=2)


def growth(*flags):
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    return run("growth", *sizes, *flags)


@pytest.mark.slow
def test_small(tmp_path):
    path, picture = tmp_path / "table.json", tmp_path / "growth.png"
    done = growth("--lengths=16,64", "--rules=SSD", f"--json={path}", f"--picture={picture}")
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = json.loads(path.read_text())
    seconds = {}
    for row in table["rows"]:
        seconds[row["mixer"], row["length"]] = row["us_per_token"] * row["length"]
        assert row["us_per_token"] > 0
        line = f"{row['rule']:16} {row['mixer']:18} {row['length']:8} {row['us_per_token']:9.2f}"
        assert f"{line} {row['mib']:8.0f}" in done.stdout
    names = ("alone", "Logarithmic + GRM", "Constant + SSC")
    assert list(seconds) == [(name, length) for name in names for length in (16, 64)]
    for name, ratio in table["ratios"].items():
        assert f"{name}: {ratio:.2f}" in done.stdout
    *over_alone, routed = table["ratios"].values()
    for length, ratio in zip((16, 64), over_alone, strict=True):
        wanted = seconds["Logarithmic + GRM", length] / seconds["alone", length]
        assert ratio == pytest.approx(wanted)
    longer = seconds["Constant + SSC", 64] / 4 / seconds["Constant + SSC", 16]
    assert routed == pytest.approx(longer)


@pytest.mark.slow
def test_errors_of_composed_runs():
    done = growth("--errors=64", "--rules=GatedDeltaNet,RWKV7,SWLA")
    assert done.returncode == 0, done.stderr
    title, *lines = done.stdout.splitlines()
    assert title.split() == ["rule", "composed", "in", "turn"]
    names, composed, in_turn = zip(*(line.split() for line in lines), strict=True)
    assert names == ("GatedDeltaNet", "RWKV7", "SWLA")
    for error, other in zip(map(float, composed), map(float, in_turn), strict=True):
        assert 0 < error <= 4 * other < 1e-4


@pytest.mark.slow
def test_an_unknown_rule_takes_one_line():
    done = growth("--rules=Nothing")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --rules must be of")


@pytest.mark.slow
def test_the_operation_alone():
    done = growth("--operation", "--lengths=16", "--rules=SSD")
    assert done.returncode == 0, done.stderr
    assert "gradient of the operation" in done.stdout
    assert "SSD, T = 16: Logarithmic + GRM / alone" in done.stdout


@pytest.mark.slow
def test_states_that_are_carried():
    done = growth("--starts=4", "--lengths=16", "--rules=DeltaNet")
    assert done.returncode == 0, done.stderr
    title, *lines = done.stdout.splitlines()
    assert title.split() == [
        "rule",
        "chunk",
        "k",
        "=",
        "v",
        "in",
        "turn,",
        "ms",
        "at",
        "once,",
        "ms",
    ]
    assert [line.split()[:3] for line in lines] == [
        ["DeltaNet", "4", str(k)] for k in (8, 16, 32, 64)
    ]
    assert all(float(x) > 0 for line in lines for x in line.split()[3:])
