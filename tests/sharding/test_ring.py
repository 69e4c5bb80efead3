"""A ring of states, compiled for a TPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_a_tpu_reads_while_states_travel_and_keeps_them_on_the_host():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.sharding.compile_pod"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout)
    # Of each of two layers, the states after four segments of four rows of one head.
    assert found["host"] >= 2 * 4 * 4 * 64 * 64 * 4
    assert found["hops_during_reads"]
