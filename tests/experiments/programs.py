"""Runs programs as ``python -m`` does, in processes that begin with the library imported.

Importing JAX and the library takes longer than most of these programs: one server does so, and
each process is a fork of it.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

# The server has no threads yet.
warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "experiments._program", "memcache_jax.training"])


def run_here(module, flags, environment, outputs):
    """Makes this process the program; its outputs go to two files."""
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run(program, *flags, timeout: Any = 300, **environment):
    """Runs ``python -m experiments.PROGRAM`` with flags to its end."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        arguments = f"experiments.{program}", flags, environment, outputs
        process = SERVER.Process(target=run_here, args=arguments)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{program} ran for more than {timeout} s")
        out, err = (path.read_text() for path in outputs)
        return subprocess.CompletedProcess(flags, process.exitcode, out, err)
