"""Every kernel compiles for TPUs, forward and backward, with no TPU here."""

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
from memcache_jax.kernels.bank_read import bank_read

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KERNELS = {
    "bank_read": ("forward", "backward_rows", "backward_bank"),
    "grouped_read": ("forward", "backward"),
    "ssc_route": ("forward", "backward"),
    "chunk_update": ("forward", "backward"),
    "affine_update": ("forward", "backward"),
}
STEPS = {
    "titans_grm": ("chunk_update", "bank_read"),
    "gated_delta_net_ssc": ("affine_update", "ssc_route", "grouped_read"),
}


needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")


def printed(module, topology):
    """The lines that a program prints, which compiles for a topology."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}", topology],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_kernels_compile(topology):
    compiled = json.loads(printed("compile_for_tpu", topology)[-1])
    assert len(compiled) == 5
    for case, names in compiled.items():
        operation = case.split(",")[0]
        missing = [k for k in KERNELS[operation] if f"{operation}_{k}" not in names]
        assert not missing, f"{case}: {missing} not in {names}"


@pytest.mark.slow
@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_train_steps_compile(topology):
    lines = [line.split() for line in printed("compile_train_step", topology)]
    assert {name: set(kernels) for name, _, *kernels in lines} == {
        model: {
            f"{operation}_{kernel}" for operation in operations for kernel in KERNELS[operation]
        }
        for model, operations in STEPS.items()
    }


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
