"""Cached states in narrow numbers and on the host."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, make_inputs
from tests.streams import empty, over_time, whole


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_a_step_copies_a_few_states_to_the_device():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    command = [sys.executable, "-m", "tests.streaming.compile_host_caches"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert not done.returncode, done.stderr
    analyses = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(analyses) == 2  # linear attention and Titans
    for size in analyses:
        assert size["host_arguments"] >= size["bank"]
        assert size["host_in_place"] >= size["bank"]  # written where they are
        assert size["host_temporaries"] < size["bank"] / 20
        assert size["device"] < size["bank"] / 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("linear", mc.GRM()), ("titans", mc.SSC(top_k=2))], ids=["grm", "ssc"]
)
def test_narrow_states(name, kind):
    memory = MEMORIES[name]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 36, dim=16, dtype=jnp.float32))
    wanted, step = whole(inputs, memory, kind, mc.Constant(8)), jax.jit(mc.extend)
    nbytes, errors = [], []
    for dtype in ("float32", "bfloat16", "int8"):
        cache = empty(inputs, memory, kind, mc.Constant(8), cache_dtype=dtype)
        nbytes.append(sum(x.nbytes for x in jax.tree.leaves(cache.bank)))
        outputs = []
        for begin in range(0, 36, 3):  # less than a chunk: one loop to compile
            part = over_time(inputs, memory, lambda x, b=begin: x[:, b : b + 3])
            y, cache = step(cache, **part)
            outputs.append(y)
        difference = np.concatenate(outputs, axis=1) - wanted
        errors.append(float(np.linalg.norm(difference) / np.linalg.norm(wanted)))
    assert nbytes[1] == nbytes[0] / 2
    assert nbytes[2] < nbytes[0] / 3
    assert errors[0] < 1e-5 < errors[1] < 4e-3
    assert errors[2] < 8e-3
