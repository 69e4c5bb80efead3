"""Block sizes: every candidate is timed, and the fastest are written where kernels look."""

from pathlib import Path

import jax.numpy as jnp
import pytest

import memcache_jax as mc
from experiments._kernel_cases import Case
from experiments.tune_kernels import CANDIDATES, best, candidates, render, tune, write
from memcache_jax.kernels import _table
from memcache_jax.kernels._block_sizes import block_sizes, tuned_for
from memcache_jax.kernels._triton import TritonSizes
from memcache_jax.kernels.bank_read import bank_read
from tests.experiments.programs import run

KEY = "NVIDIA H200 n3 c4 8x8 float32"


def read_a_bank():
    plan = mc.Constant(4).plan(16)

    def call(how, bank, query, gates):
        read = mc.memories.LinearAttention().read
        return bank_read(read, bank, query, gates, plan.reads, implementation=how)

    shapes = ((1, 1, 3, 8, 8), (1, 1, 4, 4, 8), (1, 1, 4, 4, 3))
    bank, query, gates = map(jnp.ones, shapes)
    return Case("bank_read", call, ((bank,), query, gates), 0.0, 0.0)


def fake_timer(function, *arrays):
    """Fastest with 32 rows, 8 warps and 2 loads in flight; 128 rows do not compile."""
    function.trace(*arrays)
    sizes = block_sizes(TritonSizes, "bank_read/pallas_gpu", "n3 c4 8x8", jnp.float32)
    if sizes.rows == 128:
        raise RuntimeError("too many rows")
    return 1 + abs(sizes.rows - 32) + abs(sizes.num_warps - 8) + abs(sizes.num_stages - 2)


def tuned():
    with tuned_for("NVIDIA H200"):
        return list(tune(read_a_bank(), "pallas_gpu", fake_timer))


@pytest.mark.slow
def test_every_candidate_is_timed_and_the_fastest_is_found(tmp_path, monkeypatch):
    rows = tuned()
    assert [row["sizes"] for row in rows] == candidates("bank_read/pallas_gpu")
    assert len(rows) == 4 * 2 * 3
    failed = [row for row in rows if "failed" in row]
    assert {row["sizes"]["rows"] for row in failed} == {128}
    assert failed[0]["failed"] == "RuntimeError: too many rows"
    wanted = {"rows": 32, "num_warps": 8, "num_stages": 2}
    assert best(rows) == {("bank_read/pallas_gpu", KEY): wanted}

    write(rows, tmp_path / "table.py")
    table = {}
    exec((tmp_path / "table.py").read_text(), table)
    changed = table["TABLE"]["bank_read/pallas_gpu"]
    assert changed == {**_table.TABLE["bank_read/pallas_gpu"], KEY: wanted}
    monkeypatch.setitem(_table.TABLE, "bank_read/pallas_gpu", changed)
    with tuned_for("NVIDIA H200"):
        sizes = block_sizes(TritonSizes, "bank_read/pallas_gpu", "n3 c4 8x8", jnp.float32)
    assert sizes == TritonSizes(**wanted)


def test_what_has_no_kernel_is_told():
    def call(how, x):
        raise NotImplementedError(how)

    case = Case("none", call, (jnp.ones(1),), 0.0, 0.0)
    assert list(tune(case, "pallas_gpu", fake_timer)) == [dict(name="none", failed="pallas_gpu")]


@pytest.mark.parametrize("name", _table.TABLE)
def test_candidates_are_of_the_sizes_that_there_are(name):
    assert {*CANDIDATES[name]} <= {*_table.TABLE[name]["default"]}
    assert len(candidates(name)) > 2


def test_the_table_is_written_as_it_is():
    path = Path(_table.__file__)
    assert render(_table.TABLE) == path.read_text()


@pytest.mark.slow
def test_without_a_device_nothing_is_written():
    path = Path(_table.__file__)
    before = path.read_text()
    done = run("tune_kernels")
    assert done.returncode == 1
    assert "no GPU or TPU here" in done.stdout
    assert path.read_text() == before
