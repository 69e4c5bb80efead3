"""Compiles every kernel without a device, and compares the figures to stored ones.

    python -m experiments.schedules [--chips=v5e,v5p,v6e,h200] [--only=bank_read] [--json=FILE]

For TPUs, which need libtpu, it prints the bundles of each kernel and of each loop's body. For GPUs,
which need jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12, it prints registers and
spilled bytes per thread, threads and shared memory. Nothing runs: the figures show that a kernel
has changed, not how fast it is. ``experiments/schedules.json`` stores the figures; pass that file
as ``--json`` to update it; with ``--only``, other cases keep their figures.

``--shapes`` compiles whole calls of odd shapes for the TPUs instead, with their gradients: every
rule with every aggregation, one to five heads of 32 to 256, lengths that segments do not divide. It
prints the seconds of each, and ends with status 1 if any fails.
"""

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from experiments._compilers import (
    GPU,
    TPUS,
    NoCompilerError,
    apart,
    compiler,
    gpu_figures,
    tpu_figures,
)
from experiments._kernel_cases import cases, is_chosen, passes
from experiments._odd_shapes import compile_shape, odd_shapes
from experiments._program import run
from experiments._schedules import changes, updated
from experiments._tpu_cases import tpu_cases

_CHIPS = flags.DEFINE_list("chips", [*TPUS, GPU], "Chips to compile for.")
_ONLY = flags.DEFINE_list(
    "only", None, "Parts of the names of cases to compile, such as bank_read."
)
_SHAPES = flags.DEFINE_bool("shapes", False, "Compile whole calls of odd shapes instead.")
_JSON = flags.DEFINE_string("json", None, "File to update with the figures.")

KEPT = Path(__file__).with_suffix(".json")


def measure(chip: str, only: Sequence[str] | None) -> dict[str, Any]:
    """Compiles all kernels for a chip; returns its ``compiler`` and the figures of ``kernels``.

    Args:
      chip: one of ``TPUS``, or ``GPU``.
      only: parts of names that select cases; None for all.

    Raises:
      NoCompilerError: if the compiler for this chip is not installed.
    """
    version = compiler(chip)
    kernels = {}
    if chip == GPU:
        for case in cases("large", jnp.bfloat16, only, abstract=True):
            both = functools.partial(passes(case)["backward"], "pallas_gpu")
            found = gpu_figures(both, *case.arrays)
            kernels |= {f"{case.name}: {name}": figures for name, figures in found.items()}
    else:
        for case, (both, arguments) in tpu_cases().items():
            found = tpu_figures(chip, both, *arguments) if is_chosen(case, only) else {}
            kernels |= {f"{case}: {name}": figures for name, figures in found.items()}
    return dict(compiler=version, kernels=dict(sorted(kernels.items())))


def show(chip: str, found: dict[str, Any], kept: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of one chip: each kernel's figures, and changes from the stored ones."""
    yield f"{chip}, {found['compiler']}"
    for kernel, figures in found["kernels"].items():
        yield f"  {kernel:60} " + "  ".join(f"{name} {n}" for name, n in figures.items())
    if not kept:
        yield "  No stored figures to compare to."
        return
    before = {
        name: figures
        for name, figures in kept["kernels"].items()
        if is_chosen(name.split(":")[0], _ONLY.value)
    }
    different = changes(found["kernels"], before)
    yield f"  {len(different) or 'None'} different from the stored ones ({kept['compiler']})."
    yield from (f"    {words}" for words in different)


def compile_shapes(chip: str, only: Sequence[str] | None) -> int:
    """Prints which calls of odd shapes compile for a TPU; returns how many fail."""
    shapes = [shape for shape in odd_shapes() if is_chosen(shape.name, only)]
    failures = 0
    for shape, told in zip(shapes, apart(compile_shape, [chip] * len(shapes), shapes), strict=True):
        print(f"{chip}  {shape.name:60} {told}", flush=True)
        failures += told.startswith("failed")
    return failures


def main() -> None:
    """Compiles for one chip after another."""
    if unknown := set(_CHIPS.value) - {*TPUS, GPU}:
        raise ValueError(
            f"chips must be of {', '.join([*TPUS, GPU])}, got {', '.join(sorted(unknown))}"
        )
    if _SHAPES.value:
        chips = [chip for chip in _CHIPS.value if chip in TPUS]
        sys.exit(min(1, sum(compile_shapes(chip, _ONLY.value) for chip in chips)))
    kept = json.loads(KEPT.read_text())
    figures = {}
    for chip in _CHIPS.value:
        try:
            (figures[chip],) = apart(measure, [chip], [_ONLY.value])
        except NoCompilerError as e:
            print(f"{chip}: skipped, its compiler is not installed ({e})")
            continue
        print(*show(chip, figures[chip], kept.get(chip, {})), "", sep="\n", flush=True)
    if _JSON.value:
        path = Path(_JSON.value)
        every = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(updated(every, figures, _ONLY.value), indent=1) + "\n")


if __name__ == "__main__":
    run(main)
