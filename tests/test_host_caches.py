"""Cached states on the host, compiled for a TPU: they stay there, and only a few are copied."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest


@pytest.mark.tpu
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_a_step_copies_a_few_states_to_the_device():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    command = [sys.executable, "-m", "tests.compile_host_caches"]
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
