"""The updates' kernels compile for TPUs, forward and backward."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed"),
]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_are_in_the_program(topology):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    command = [sys.executable, "-m", "tests.kernels.compile_updates", topology]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert not done.returncode, done.stderr
    affine = "affine_update_backward affine_update_forward"
    assert done.stdout.splitlines() == [
        f"decay {affine}",
        f"delta {affine}",
        "titans chunk_update_backward chunk_update_forward",
    ]
