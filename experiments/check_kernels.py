"""Checks every GPU kernel against float64, then compares its time to XLA and attention.

    make gpu-check        (python -m experiments.check_kernels [--only=bank_read] [--json=FILE])

Prints milliseconds and TFLOP/s of each kernel, forward and backward, the fraction of a large
bfloat16 matmul's rate and of a large copy's bandwidth, measured in the same run, and the time of
the XLA path. For comparison it times causal flash attention (cuDNN) at equal sizes, and the kernels
of flash-linear-attention if it and torch are installed. Without a GPU it only compiles the kernels,
if the packages for that are installed (see ``experiments.schedules``), or else lowers them to
Triton's IR.
"""

import contextlib
import functools
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags

from experiments._compilers import apart
from experiments._kernel_cases import Case, cases, passes
from experiments._program import run

FLAGS = flags.FLAGS
flags.DEFINE_list("only", None, "Parts of the names of cases to run, such as bank_read.")
flags.DEFINE_integer("rounds", 15, "Timed rounds.", 1)
flags.DEFINE_float("minutes", 7.5, "Stop after this many minutes.", 0)
flags.DEFINE_string("json", None, "File to write the table to.")

# Relative to the largest output; twice as much for gradients.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def errors() -> Iterator[dict[str, Any]]:
    """Yields each kernel's largest error against float64 on the CPU, and whether that is good."""
    import jax.numpy as jnp

    for dtype in reversed(TOLERANCE):
        for case in cases("small", jnp.dtype(dtype), FLAGS.only):
            row: dict[str, Any] = dict(name=case.name, kind=dtype)
            with reported(row):
                row["error"] = _error(case)
            row["good"] = row.get("error", np.inf) < TOLERANCE[dtype]
            yield row


def _error(case: Case) -> float:
    import jax

    both = jax.jit(passes(case)["backward"], static_argnums=0)
    with jax.default_matmul_precision("highest"):
        got = both("pallas_gpu", *case.arrays)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), case.arrays)
        wanted = both("xla", *wide)
    worst = np.float64(0)
    for part, trees in enumerate(zip(got, wanted, strict=True)):
        for one, other in zip(*map(jax.tree.leaves, trees), strict=True):
            other = np.asarray(other)
            difference = np.abs(np.asarray(one, np.float64) - other).max()
            error = difference / max(np.abs(other).max(), 1e-3) / (1 + part)
            worst = np.maximum(worst, error)  # NaN stays
    return float(worst)


@contextlib.contextmanager
def reported(row: dict[str, Any]) -> Iterator[None]:
    """Records an exception in the row and continues with the other kernels."""
    try:
        yield
    except Exception as e:  # compilers raise many kinds
        row["failed"] = " ".join(f"{type(e).__name__}: {e}".split())[:300]


def seconds(function: Callable, *arguments: Any) -> float:
    """Returns the median time of a compiled function."""
    import jax

    times = []
    for _ in range(FLAGS.rounds + 2):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def table() -> Iterator[dict[str, Any]]:
    """Yields the times of a matmul, a copy, every kernel and its XLA path, and attention."""
    import jax
    import jax.numpy as jnp

    square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    rate = 2 * 8192**3 / seconds(jax.jit(lambda a: a @ a), square)
    block = jnp.ones((2**28,), jnp.float32)
    bandwidth = 2 * block.nbytes / seconds(jax.jit(lambda a: a + 1), block)
    yield dict(name="matmul 8192, bfloat16", tflops=rate / 1e12)
    yield dict(name="copy 1 GiB", gbytes=bandwidth / 1e9)
    for case in cases("large", jnp.bfloat16, FLAGS.only):
        for kind, function in passes(case).items():
            row: dict[str, Any] = dict(name=case.name, kind=kind)
            jitted = jax.jit(function, static_argnums=0)
            with reported(row):
                row["seconds"] = seconds(jitted, "pallas_gpu", *case.arrays)
                flops = case.flops * (1 if kind == "forward" else 3)
                row["tflops"] = flops / row["seconds"] / 1e12
                row["of_matmul"] = flops / row["seconds"] / rate
                if kind == "forward":
                    row["of_copy"] = case.bytes / row["seconds"] / bandwidth
            with reported(row):
                row["xla"] = seconds(jitted, "xla", *case.arrays)
            yield row
    for baseline in (_attention, _flash_linear_attention):
        row = dict(name=baseline.__name__)
        with reported(row):
            yield from baseline()
        if "failed" in row:
            yield row


def _attention() -> Iterator[dict[str, Any]]:
    """Times causal flash attention at the sizes of the operations."""
    import jax
    import jax.numpy as jnp

    for k in (64, 128):
        q, key, v = jnp.ones((3, 2, 64 * 256, 8, k), jnp.bfloat16)

        def attend(q: Any, key: Any, v: Any) -> Any:
            return jax.nn.dot_product_attention(q, key, v, is_causal=True, implementation="cudnn")

        gradient = jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        for kind, function in (("forward", attend), ("backward", gradient)):
            name = f"cuDNN attention k={k}, T=16384"
            yield dict(name=name, kind=kind, seconds=seconds(jax.jit(function), q, key, v))


def _flash_linear_attention() -> Iterator[dict[str, Any]]:
    """Times the Triton kernels of flash-linear-attention at the same sizes, if installed."""
    try:
        torch, delta, gla = map(
            importlib.import_module, ("torch", "fla.ops.gated_delta_rule", "fla.ops.simple_gla")
        )
    except ImportError:
        yield dict(name="flash-linear-attention is not installed")
        return
    for k in (64, 128):
        q, key, v = torch.randn(3, 2, 64 * 256, 8, k, device="cuda", dtype=torch.bfloat16)
        key = torch.nn.functional.normalize(key, dim=-1)
        g = -0.1 * torch.rand(2, 64 * 256, 8, device="cuda")
        beta = torch.rand(2, 64 * 256, 8, device="cuda", dtype=torch.bfloat16)
        for rule, function in (
            ("simple_gla", lambda q, key, v, g=g: gla.chunk_simple_gla(q, key, v, g)),
            (
                "gated_delta_rule",
                lambda q, key, v, g=g, beta=beta: delta.chunk_gated_delta_rule(q, key, v, g, beta),
            ),
        ):
            for kind in ("forward", "backward"):
                arrays = [x.clone().requires_grad_(kind == "backward") for x in (q, key, v)]

                def run(function: Any = function, kind: str = kind, arrays: Any = arrays) -> None:
                    y = function(*arrays)[0]
                    if kind == "backward":
                        y.sum().backward()
                    torch.cuda.synchronize()

                name = f"flash-linear-attention {rule} k={k}"
                yield dict(name=name, kind=kind, seconds=seconds(run))


def compiled(name: str) -> list[dict[str, Any]]:
    """Compiles a case's kernels without a GPU, or lowers them if there is no compiler."""
    import jax
    import jax.numpy as jnp

    from experiments._compilers import KERNEL, NoCompilerError, gpu_figures
    from memcache_jax.kernels._triton import lowered_for_gpu

    (case,) = cases("small", jnp.bfloat16, [name], abstract=True)
    both = functools.partial(passes(case)["backward"], "pallas_gpu")
    row: dict[str, Any] = dict(name=name, good=False)
    with reported(row):
        try:
            found = gpu_figures(both, *case.arrays)
        except NoCompilerError:
            text = lowered_for_gpu(jax.jit(both), *case.arrays).as_text()
            found = {kernel: {} for kernel in sorted(set(KERNEL.findall(text)))}
        assert found, "no kernel in the program"
        came = "compiled" if any(found.values()) else "lowered"
        return [dict(name=name, kind=kernel, came=came) | found[kernel] for kernel in found]
    return [row]


def show(row: dict[str, Any]) -> str:
    """Formats a row as a line of text."""
    marks = dict(error="{:.1e}", seconds="{:.3f} ms", xla="XLA {:.3f} ms", tflops="{:.1f} TFLOP/s")
    marks |= dict(of_matmul="{:.0%} of matmul", of_copy="{:.0%} of copy", gbytes="{:.0f} GB/s")
    marks |= dict(came="{}", registers="{} registers", spilled="{} bytes spilled")
    parts = [f"{row['name']:40} {row.get('kind', ''):27}"]
    for name, mark in marks.items():
        if name in row:
            scale = 1e3 if name in ("seconds", "xla") else 1
            parts.append(mark.format(scale * row[name]))
    if "good" in row:
        parts.append("ok" if row["good"] else "WRONG")
    return "  ".join([*parts, row.get("failed", "")])


def program() -> None:
    """Prints errors and times as they are measured; exits with 1 if a kernel is wrong."""
    import jax
    import jax.numpy as jnp

    with_gpu = any(device.platform == "gpu" for device in jax.devices())
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    end = time.monotonic() + 60 * FLAGS.minutes
    rows = []
    if with_gpu:
        found = itertools.chain(errors(), table())
    else:
        names = [case.name for case in cases("small", jnp.bfloat16, FLAGS.only, abstract=True)]
        found = itertools.chain.from_iterable(apart(compiled, names))
    for row in found:
        rows.append(row)
        print(show(row), flush=True)
        if FLAGS.json:
            with open(FLAGS.json, "w") as file:
                json.dump(rows, file, indent=2)
        if time.monotonic() > end:
            print(f"Stopped after {FLAGS.minutes} minutes, before the remaining cases.")
            break
    if not with_gpu:
        what = " or ".join(sorted({row["came"] for row in rows if "came" in row})) or "not compiled"
        print(f"\nThere is no GPU here: kernels were {what} for one, and nothing ran.")
    if not all(row.get("good", True) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run(program)
