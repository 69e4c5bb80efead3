"""Compiles kernels for chips that this machine lacks, and reads the compilers' figures."""

import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from experiments._hlo import printed
from experiments._schedules import Figures, bundles, launches, registers

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""Kinds of TPU, and a topology of each."""

GPU = "h200"

_CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin")

KERNEL = re.compile(
    "(?:affine_update|bank_read|chunk_update|deep_update|grouped_read|relevance|ssc_route)_(?:back|for)ward(?:_[a-z]+)*"
)
"""The name of a kernel inside the names that compilers give it."""

_ENTRY = re.compile(rf"\.entry {KERNEL.pattern}(?:__\d+)?\(")  # a number if there are several

# Limits that XLA normally asks the driver for, from NVIDIA's tables of the H200 and of compute
# capability 9.0.
_H200 = """
gpu_device_info {
  name: "NVIDIA H200"
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""


def check_topology(topology: str) -> None:
    """Raises ValueError for a topology without chips, on which libtpu ends the process."""
    shape = re.fullmatch(r"[\w ]+[=_:]([0-9x]+)(_twisted|_untwisted)?", topology)
    sizes = [] if shape is None else shape[1].split("x")
    if not topology or any(size.strip("0") == "" for size in sizes if size):
        raise ValueError(
            "a topology needs a kind of TPU and at least one chip along each axis, such as "
            f"v5e:16x16, got {topology!r}"
        )


class NoCompilerError(ImportError):
    """A chip's compiler is not installed; the message says how to install it."""


def apart(function: Callable[..., Any], *every: Iterable[Any]) -> Iterator[Any]:
    """``map`` in a process of its own, in which JAX uses the CPU only.

    A process can compile for a single kind of TPU, since libtpu reads its flags once, and cannot
    compile for CUDA after JAX has failed to find a GPU.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, *every)


def tpu_figures(chip: str, function: Callable[..., Any], *arguments: Any) -> dict[str, Figures]:
    """Compiles a function for a TPU, and returns the ``bundles`` of its kernels.

    Args:
      chip: one of ``TPUS``; the same one in all calls of a process.
      function: a function that runs kernels.
      *arguments: the shapes of its arguments.

    Raises:
      NoCompilerError: if libtpu is not installed.
      NotImplementedError: if XLA cannot print the program.
      RuntimeError: if libtpu did not write a kernel's schedule.
    """
    device, dumped = _tpu(chip)
    folder = Path(dumped.name)
    for path in folder.iterdir():
        path.unlink()
    compiled = jax.jit(function).lower(*placed(arguments, device)).compile()
    calls = [line for line in printed(compiled).splitlines() if "tpu_custom_call" in line]
    found = {}
    for path in folder.glob("*[0-9]-final_bundles.txt"):
        if name := KERNEL.search(path.name):
            assert name[0] not in found, "each kernel once"
            found[name[0]] = bundles(path.read_text())
    if missing := set(KERNEL.findall("\n".join(calls))) - set(found):
        raise RuntimeError(f"libtpu wrote no schedule for {', '.join(sorted(missing))}")
    return dict(sorted(found.items()))


@functools.cache
def _tpu(chip: str) -> tuple[Any, tempfile.TemporaryDirectory]:
    """Returns a described TPU, and the folder that its compiler writes to."""
    folder = tempfile.TemporaryDirectory()
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder.name} --xla_jf_dump_llo_text=true"
        " --xla_jf_dump_llo_pass_label_regex=final_bundles"
    )
    return described_tpu(chip), folder


def described_tpu(chip: str) -> Any:
    """Returns a TPU to compile for.

    Args:
      chip: one of ``TPUS``; the same one in all calls of a process.

    Raises:
      NoCompilerError: if libtpu is not installed.
    """
    if not importlib.util.find_spec("libtpu"):
        raise NoCompilerError("pip install libtpu")
    os.environ.pop("XLA_FLAGS", None)  # libtpu ends the process on flags it does not know
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip])
    return topology.devices[0]


def gpu_figures(function: Callable[..., Any], *arguments: Any) -> dict[str, Figures]:
    """Compiles a function for an H200, and returns ``registers`` and ``launches`` of its kernels.

    For several kernels of one name, it returns the largest figures.

    Raises:
      NoCompilerError: if the compiler's packages are not installed.
    """
    from memcache_jax.kernels._triton import lowered_for_gpu

    device, ptxas = _gpu()
    lowered = lowered_for_gpu(jax.jit(function), *placed(arguments, device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lowered.compile(compiler_options={"xla_dump_to": name})
        (thunks,) = folder.glob("*.thunk_sequence.txt")
        launched = launches(thunks.read_text())
        found = {}
        for path in folder.glob("*.ptx"):
            text = path.read_text()
            if _ENTRY.search(text):
                command = [ptxas, "-v", "--gpu-name=sm_90a", path, "-o", os.devnull]
                told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                found |= registers(told)
    largest: dict[str, Figures] = {}
    for entry in sorted(found):
        name = entry.split("__")[0]
        if KERNEL.fullmatch(name):
            so_far = largest.setdefault(name, {})
            for figure, number in (found[entry] | launched[entry]).items():
                so_far[figure] = max(number, so_far.get(figure, 0))
    return largest


@functools.cache
def _gpu() -> tuple[Any, str]:
    """Returns a described GPU, and the path of the assembler."""
    ptxas = _ptxas()
    if not ptxas or not any(map(importlib.util.find_spec, _CUDA)):
        raise NoCompilerError("pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=GPU, target_config=_H200, topology="1x1x1"
    )
    return topology.devices[0], ptxas


def _ptxas() -> str | None:
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        for path in Path(folder).glob("*/bin/ptxas"):
            return str(path)
    return shutil.which("ptxas")


def placed(arguments: Any, device: Any) -> Any:
    """Returns shapes of arrays on a device."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )


def compiler(chip: str) -> str:
    """Returns the name and version of the compiler for one of ``TPUS``, or for ``GPU``.

    Raises:
      NoCompilerError: if it is not installed.
    """
    versions = dict(jaxlib=importlib.metadata.version("jaxlib"))
    if chip == GPU:
        _, ptxas = _gpu()
        told = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True)
        versions["ptxas"] = re.findall(r"V([\d.]+)", told.stdout)[0]
    else:
        _tpu(chip)
        versions["libtpu"] = importlib.metadata.version("libtpu")
    return ", ".join(f"{name} {version}" for name, version in versions.items())
