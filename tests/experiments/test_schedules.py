"""Schedules of kernels: what is read from compilers' texts, and what differs from kept figures."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments._compilers import GPU, TPUS
from experiments._schedules import bundles, changes, launches, registers, updated

KEPT = json.loads((Path(__file__).parents[2] / "experiments/schedules.json").read_text())

BUNDLES = """
LB: loop body
= control target key end

     0   :  { %s1 = smov.u32 3 }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 /* a comment
 of two lines, 0x7 LB: > { */ }
   0x2   : > { %s3 = sst [smem:[#allocation1]] %s2 }
   0x3   :  {}
   0x4 LB: >> { %v1 = vld [vmem:[%s3]] }
   0x5 PF: >> { %p1 = scmp.ge.s32.totalorder %s2, 3 }
   0x6   :  {}
   0x7 PF: > { %s4 = sadd.s32 1, %s1 }
   0x8 LB: >> { %v2 = vld [vmem:[%s4]] }
   0x9 LB: >>> { %v3 = vld [vmem:[%s4]] }
   0xa   : > { %5 = sbr.rel (!%p1) target = $region3 }
   0xb   :  { %6 = vsyncpa [#allocation2], 1 }
   0xc   : > { %s7 = smov.u32 %s4 }
   0xd LB: > { %s8 = smov.u32 %s4 }
   0xe LB: >> { %s9 = smov.u32 %s4 }
   0xf   :  { %8 = vsyncpa [#allocation2], 1 }
"""
PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'ssc_route_forward' for 'sm_90a'
ptxas info    : Function properties for ssc_route_forward
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size
ptxas info    : Compiling entry function 'loop_add_fusion' for 'sm_90a'
ptxas info    : Function properties for loop_add_fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 19 registers, used 0 barriers
"""
THUNKS = """
001: kCopy         [source       | next=005 (4)] kCopy
  body:
    014: kCustomKernel [prev=013 (1) | next=015 (1)] ssc_route_forward grid: [2, 5, 2] \
threads: [256, 1, 1]  shared_memory: 16512 bytes
"""


def test_cases_that_were_not_measured_stay():
    kept = dict(v5e=dict(compiler="a", kernels=dict(x=1, y=2)), v6e=dict(compiler="a", kernels={}))
    new = dict(v5e=dict(compiler="a", kernels=dict(y=3)))
    assert updated(kept, new, ["y"]) == kept | dict(v5e=dict(compiler="a", kernels=dict(x=1, y=3)))
    assert updated(kept, new, None) == kept | new
    assert updated({}, new, ["y"]) == new
    wanted = "v5e come from a, the new ones from b: measure without --only"
    with pytest.raises(ValueError, match=wanted):
        updated(kept, dict(v5e=dict(compiler="b", kernels={})), ["y"])


def test_bundles_of_loops():
    assert bundles(BUNDLES) == {
        "bundles": 16,
        "loop 1": 6,
        "loop 1.1": 3,
        "loop 1.2": 1,
        "loop 1.2.1": 1,
        "loop 2": 1,
        "loop 2.1": 1,
    }


@pytest.mark.parametrize("text", ["", "   0x1   : >> { %s1 = smov.u32 3 }"], ids=["none", "loop"])
def test_texts_that_are_not_understood(text):
    with pytest.raises(ValueError, match="expected"):
        bundles(text)


def test_registers_and_launches():
    assert registers(PTXAS) == {
        "ssc_route_forward": dict(registers=255, spilled=20),
        "loop_add_fusion": dict(registers=19, spilled=0),
    }
    assert launches(THUNKS) == {"ssc_route_forward": dict(threads=256, shared_memory=16512)}


def test_changes_beyond_a_tolerance():
    kept = {"a": {"bundles": 100, "loop 1": 50}, "b": {"bundles": 1}}
    found = {"a": {"bundles": 109, "loop 1.1": 45}, "c": {"bundles": 1}}
    assert changes(kept, kept) == []
    assert changes(found, kept, 0.1) == [
        "a: loop 1.1 45, kept 0",
        "a: loop 1 0, kept 50",
        "b: gone",
        "c: new",
    ]
    assert changes(found, kept)[0] == "a: bundles 109, kept 100"
    assert changes(kept, found, 0.08)[0] == "a: bundles 100, kept 109"


def test_figures_are_kept_of_every_kernel_and_chip():
    assert {*KEPT} == {*TPUS, GPU}
    operations = {"affine_update", "bank_read", "grouped_read", "ssc_route"}
    for chip, kept in KEPT.items():
        kernels = {kernel.split(": ")[1] for kernel in kept["kernels"]}
        for way in ("forward", "backward"):
            found = {kernel.split(f"_{way}")[0] for kernel in kernels if f"_{way}" in kernel}
            # On a GPU the chunked update is the affine one or the deep one.
            others = {"deep_update"} if chip == GPU else {"chunk_update", "relevance"}
            assert found == operations | others


@pytest.mark.slow
def test_kernels_are_compiled_or_lowered_for_a_gpu_that_is_not_there():
    only = "--only=ssc_route u=96,grouped_read k=96"
    command = [sys.executable, "-m", "experiments.check_kernels", only]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    kernels = re.findall(r"(\w+) +(?:compiled|lowered)", done.stdout.replace(lines[-1], ""))
    parts = ("forward", "backward_rows")
    names = [f"{name}_{part}" for name in ("grouped_read", "ssc_route") for part in parts]
    names += ["grouped_read_backward_bank", "ssc_route_backward_keys"]
    assert sorted(kernels) == sorted(names)
    assert re.fullmatch(
        "There is no GPU here: .* (compiled|lowered) for one, and nothing ran.", lines[-1]
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda12_plugin"), reason="what compiles for CUDA is not here"
)
def test_gpu_kernels_compile_to_the_schedules_that_were_kept(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "experiments.schedules", f"--chips={GPU}", f"--json={file}"]
    subprocess.run(command, check=True)
    found = json.loads(file.read_text())[GPU]
    if found["compiler"] != KEPT[GPU]["compiler"]:
        pytest.skip(f"kept from {KEPT[GPU]['compiler']}, here is {found['compiler']}")
    assert not changes(found["kernels"], KEPT[GPU]["kernels"], tolerance=0.1)
