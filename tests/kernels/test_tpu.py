"""Every kernel compiles for TPUs, forward and backward, with no TPU here."""

import collections
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import memcache_jax as mc
from experiments._compilers import TPUS
from experiments._kernel_cases import is_chosen
from experiments._schedules import changes
from experiments._tpu_cases import tpu_cases
from memcache_jax.kernels.bank_read import bank_read

pytestmark = pytest.mark.usefixtures("every_platform")

ROOT = Path(__file__).parents[2]
KERNELS = {
    "bank_read": ("forward", "backward_rows", "backward_bank"),
    "grouped_read": ("forward", "backward"),
    "relevance": ("forward", "backward"),
    "ssc_route": ("forward", "backward"),
    "chunk_update": ("forward", "backward"),
    "affine_update": ("forward", "backward"),
}
STEPS = {
    "titans_grm": ("chunk_update", "relevance", "bank_read"),
    "gated_delta_net_ssc": ("affine_update", "ssc_route", "bank_read"),
    "kda_grm": ("affine_update", "relevance", "bank_read"),
}
# What other chips than the first compile: each case is compiled for two, each kernel for all.
ONLY = {
    "v5p": ("largest", "decay", "grouped_read", "relevance", "ssc_route"),
    "v6e": ("documents", "delta", "Titans", "grouped_read", "relevance", "ssc_route"),
}
MODELS = {"v5e": (*STEPS,), "v5p": ("titans_grm",), "v6e": ("gated_delta_net_ssc",)}


needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")


def printed(module, *arguments):
    """The lines that a program prints, which compiles for TPUs."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("chip", [*TPUS])
def test_kernels_compile_to_the_schedules_that_were_kept(chip, tmp_path):
    file = tmp_path / "figures.json"
    only = ONLY.get(chip, ())
    chosen = [f"--only={','.join(only)}"] if only else []
    printed("experiments.schedules", f"--chips={chip}", f"--json={file}", *chosen)
    found = json.loads(file.read_text())[chip]
    kernels = collections.defaultdict(set)
    for name in found["kernels"]:
        case, kernel = name.split(": ")
        kernels[case].add(kernel)
    assert {case.split(",")[0] for case in kernels} == {*KERNELS}
    assert kernels == {
        case: {f"{operation}_{kernel}" for kernel in KERNELS[operation]}
        for case in kernels
        for operation in [case.split(",")[0]]
    }
    kept = json.loads((ROOT / "experiments/schedules.json").read_text())[chip]
    if found["compiler"] != kept["compiler"]:
        pytest.skip(f"schedules were kept from {kept['compiler']}, here is {found['compiler']}")
    before = {name: x for name, x in kept["kernels"].items() if is_chosen(name, only or None)}
    assert not changes(found["kernels"], before, tolerance=0.1)


@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("chip", [*TPUS])
def test_train_steps_compile(chip):
    module = "tests.kernels.compile_train_step"
    lines = [line.split() for line in printed(module, TPUS[chip], *MODELS[chip])]
    assert {name: set(kernels) for name, _, *kernels in lines} == {
        model: {
            f"{operation}_{kernel}" for operation in operations for kernel in KERNELS[operation]
        }
        for model in MODELS[chip]
        for operations in [STEPS[model]]
    }


@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "shape"),
    [("v5p", "KDA SSC"), ("v6e", "GatedDeltaNet SSC h=3 k=96"), ("v5e", "Titans Soup")],
)
def test_odd_shapes_compile(chip, shape):
    (line,) = printed("experiments.schedules", "--shapes", f"--chips={chip}", f"--only={shape}")
    assert line.startswith(f"{chip}  {shape}")


def test_what_does_not_fit_is_told():
    bank, query, gates = (
        jax.ShapeDtypeStruct((1, 1, *shape), jnp.float32)
        for shape in ((3, 4096, 4096), (4, 16, 4096), (4, 16, 3))
    )
    read, reads = mc.memories.LinearAttention().read, mc.Constant(1).plan(4).reads
    with pytest.raises(NotImplementedError, match=r"vector memory: any pass [0-9.]+ MiB"):
        jax.eval_shape(
            lambda *xs: bank_read(read, xs[0], xs[1], xs[2], reads, implementation="pallas_tpu"),
            (bank,),
            query,
            gates,
        )


def test_a_precision_that_kernels_lack_becomes_float32():
    function, shapes = tpu_cases()["grouped_read"]

    def traced(precision):
        with jax.default_matmul_precision(precision):
            # Another function each time, for JAX remembers what it has traced.
            return jax.jit(lambda *arguments: function(*arguments)).trace(*shapes)

    every = [traced(precision) for precision in ("high", "highest", "default")]
    counts = [str(each.jaxpr).count("Precision.HIGHEST") for each in every]
    assert counts[0] == counts[1] > counts[2] == 0
    every[0].lower(lowering_platforms=("tpu",))


@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_maps_of_chunks_stay_on_the_chip(chip):
    lines = [line.split() for line in printed("tests.kernels.compile_traffic", chip)]
    passed = {name: float(number) for name, number in lines}
    # On a v5e, tokens moved before the kernels make it 8 and 7, maps in float32 61 and 41.
    assert passed["forward"] < 6
    assert passed["both"] < 4
