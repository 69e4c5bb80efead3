"""Times the kernels with all candidate block sizes on this machine, and stores the best.

    python -m experiments.tune_kernels [--only=bank_read] [--rounds=15] [--minutes=60]

Prints the milliseconds of each candidate, forward and backward together, for each operation at the
sizes of ``check_kernels``. Writes the best to the table from which kernels choose, as a row for
this kind of device. Without a GPU or TPU it changes nothing.
"""

import copy
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments._kernel_cases import Case, cases, passes
from experiments._program import run
from experiments.check_kernels import reported, seconds

FLAGS = flags.FLAGS
FLAGS.set_default("minutes", 60)

IMPLEMENTATIONS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}
_WARPS = dict(num_warps=(4, 8), num_stages=(1, 2, 3))
_TRITON = dict(rows=(16, 32, 64, 128)) | _WARPS
_SWEEP = dict(units=(1, 2, 4, 8), group=(1, 4, 16, 64))
CANDIDATES = {
    "affine_update/pallas_gpu": dict(columns=(16, 32, 64)) | _WARPS,
    "affine_update/pallas_tpu": _SWEEP,
    "affine_update/pallas_tpu_chunks": _SWEEP,
    "bank_read/pallas_gpu": _TRITON,
    "bank_read/pallas_tpu": dict(rows=(128, 256, 512), bank_bytes=(2**20, 2**22, 2**23)),
    "chunk_update/pallas_tpu": _SWEEP,
    "deep_update/pallas_gpu": dict(units=(16, 32, 64)) | _WARPS,
    "grouped_read/pallas_gpu": _TRITON,
    "grouped_read/pallas_tpu": dict(rows=(64, 128, 256, 512)),
    "ssc_route/pallas_gpu": _TRITON,
    "ssc_route/pallas_tpu": dict(rows=(128, 256, 512)),
}
"""Sizes to try, by operation and implementation; other sizes keep their defaults."""


def candidates(name: str) -> list[dict[str, int]]:
    """Returns all block sizes to try for an operation and implementation."""
    from memcache_jax.kernels._table import TABLE

    kinds, default = CANDIDATES[name], TABLE[name]["default"]
    every = itertools.product(*kinds.values())
    return [{**default, **dict(zip(kinds, sizes, strict=True))} for sizes in every]


def tune(case: Case, implementation: str, timer: Callable[..., float]) -> Iterator[dict[str, Any]]:
    """Times a case with every candidate of each of its operations.

    Args:
      case: the operation and its arrays.
      implementation: the implementation of its kernels.
      timer: returns the seconds that a function of the arrays takes.

    Yields:
      Rows with the case's name, the operation and its row of the table, the sizes, and ``seconds``
      or the error, ``failed``.
    """
    import jax

    from memcache_jax.kernels._block_sizes import tried

    both = passes(case)["backward"]
    with tried("", {}) as asked:
        try:
            jax.eval_shape(lambda *arrays: both(implementation, *arrays), *case.arrays)
        except NotImplementedError as e:
            yield dict(name=case.name, failed=str(e))
            return
    for operation, key in sorted(asked):
        for sizes in candidates(operation):
            row: dict[str, Any] = dict(name=case.name, operation=operation, key=key, sizes=sizes)
            with reported(row), tried(operation, sizes):
                # A new function, which JAX has not traced with other sizes.
                jitted = jax.jit(lambda *arrays: both(implementation, *arrays))
                row["seconds"] = timer(jitted, *case.arrays)
            yield row


def best(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, int]]:
    """Returns the fastest sizes for each operation and row of the table."""
    timed = [row for row in rows if "seconds" in row]
    timed.sort(key=lambda row: row["seconds"], reverse=True)
    return {(row["operation"], row["key"]): row["sizes"] for row in timed}


def render(table: dict[str, Any]) -> str:
    """Formats a table as a Python file."""
    text = json.dumps(table, indent=4, sort_keys=True)
    text = re.sub(r"([^{\[,])$", r"\1,", text, flags=re.MULTILINE).removesuffix(",")
    about = (
        "Block sizes of the kernels: a default each, and what experiments.tune_kernels measured."
    )
    return f'"""{about}"""\n\nTABLE = {text}\n'


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the table, updated with the best of these rows."""
    from memcache_jax.kernels._table import TABLE

    table = copy.deepcopy(TABLE)
    for (operation, key), sizes in best(rows).items():
        table[operation][key] = sizes
    path.write_text(render(table))


def show(row: dict[str, Any]) -> str:
    """Formats a row as a line of text."""
    sizes = " ".join(f"{kind}={size}" for kind, size in row.get("sizes", {}).items())
    came = f"{1e3 * row['seconds']:.3f} ms" if "seconds" in row else row["failed"]
    return f"{row['name']:34} {row.get('operation', ''):25} {sizes:44} {came}"


def program() -> None:
    """Prints times as they are measured, and writes the best after each case."""
    import jax
    import jax.numpy as jnp

    from memcache_jax.kernels import _table
    from memcache_jax.kernels._block_sizes import tuned_for

    device = jax.devices()[0]
    implementation = IMPLEMENTATIONS.get(device.platform)
    if implementation is None:
        print("There is no GPU or TPU here: nothing was timed or written.")
        sys.exit(1)
    print(f"{device.device_kind}, jax {jax.__version__}\n")
    end = time.monotonic() + 60 * FLAGS.minutes
    rows = []
    for case in cases("large", jnp.bfloat16, FLAGS.only):
        with tuned_for(device.device_kind):
            for row in tune(case, implementation, seconds):
                rows.append(row)
                print(show(row), flush=True)
                if time.monotonic() > end:
                    print(f"Stopped after {FLAGS.minutes} minutes, in the middle of {case.name}.")
                    return
        write(rows, Path(_table.__file__))
    print("\nThe best:")
    for (operation, key), sizes in best(rows).items():
        print(f"{operation:25} {key}: {sizes}")


if __name__ == "__main__":
    run(program)
