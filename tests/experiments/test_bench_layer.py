"""The layer's times: which layers there are, and what a row says."""

import json

import pytest

import memcache_jax as mc
from tests.experiments.programs import run

SIZES = dict(length=12, features=8, heads=2, segment=4, chunk=2, rounds=2)


def bench(*flags):
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    return run("bench_layer", *sizes, *flags)


@pytest.mark.slow
def test_small(tmp_path):
    path = tmp_path / "table.json"
    done = bench("--only=Vector+GRM,SSD+SSCsoup,attention", f"--json={path}")
    assert done.returncode == 0, done.stderr
    table = json.loads(path.read_text())
    assert table["matmul_gflops"] > 0
    names = ("SSD + SSC soup", "Vector + GRM", "causal attention")
    kinds = ("forward", "gradient", "operation")
    rows = {(row["layer"], row["kind"]): row for row in table["rows"]}
    wanted = [(name, kind) for name in names for kind in kinds]
    assert list(rows) == wanted[:-1]  # attention has no such operation
    for name in names:
        assert 0 < rows[name, "forward"]["gflop"] < rows[name, "gradient"]["gflop"]
        if (name, "operation") in rows:
            assert 0 < rows[name, "operation"]["gflop"] < rows[name, "gradient"]["gflop"]
    for row in table["rows"]:
        assert row["ms"] > 0
        assert row["compile_seconds"] > 0
        ideal = row["gflop"] / table["matmul_gflops"] * 1e3
        assert row["times_matmul"] == pytest.approx(row["ms"] / ideal)
        assert f"{row['layer']:30} {row['kind']:9} {row['ms']:8.1f}" in done.stdout


@pytest.mark.slow
def test_every_rule_has_a_row_of_every_aggregation():
    done = bench("--only=no such layer")
    assert done.returncode
    rules = set(mc.memories.__all__) - {"Memory", "DeepMemory", "Control"}
    assert "Vector" in rules
    for rule in (*rules, "Titans depth 1"):
        for kind in ("Residual", "GRM", "Soup", "SSC", "SSC soup"):
            assert f"'{rule} + {kind}'" in done.stderr + done.stdout


@pytest.mark.slow
def test_steps_of_both_losses(tmp_path):
    path = tmp_path / "table.json"
    done = bench("--losses=40", f"--json={path}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert [row["loss"] for row in rows] == ["all logits", "in pieces"]
    for row in rows:
        assert min(row[name] for name in ("ms", "cpu_ms", "temporary_bytes")) > 0
        assert f"{row['loss']:12} {40:8,} {row['temporary_bytes'] / 2**30:7.3f}" in done.stdout
