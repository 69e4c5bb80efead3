"""Runs every GPU kernel: correctness against float64, then times beside what it must beat.

    make gpu-check        (python -m experiments.check_kernels [--only=bank_read] [--json=FILE])

Prints, for each kernel forward and backward: milliseconds, TFLOP/s, the share of a large bfloat16
matmul's rate and of a large copy's bandwidth measured in the same run, and the XLA path. Beside the
whole operation there is causal flash attention (cuDNN) at equal sizes, and flash-linear-attention's
kernels where torch and it are installed. Without a GPU the kernels are lowered for one, and the
program says that nothing ran.
"""

import contextlib
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_list("only", None, "Parts of names, such as bank_read, to run those alone.")
flags.DEFINE_integer("rounds", 15, "Timed rounds.")
flags.DEFINE_float("minutes", 7.5, "Stop after so many minutes.")
flags.DEFINE_string("json", None, "File to write the table to.")

# Relative to the largest output; gradients have twice that.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


class Case(NamedTuple):
    """One operation at one size.

    Attributes:
      name: of the operation and its size.
      call: (implementation, *arrays) to the outputs that are differentiable.
      arrays: what it is differentiated for.
      flops: of the forward pass; the backward pass has twice as many.
      bytes: that the forward pass must read and write at least.
    """

    name: str
    call: Callable[..., Any]
    arrays: tuple
    flops: float
    bytes: float


def cases(size: str, dtype: Any) -> list[Case]:
    """The operations at the sizes for correctness (``"small"``) or for times (``"large"``)."""
    import jax
    import jax.numpy as jnp

    import memcache_jax as mc
    from memcache_jax.kernels.bank_read import bank_read
    from memcache_jax.kernels.grouped_read import grouped_read
    from memcache_jax.kernels.ssc_route import ssc_route

    small = size == "small"
    rng = np.random.default_rng(0)
    found = []

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * scale, dtype)

    for k in (32, 64, 96, 128) if small else (64, 128):
        b, h, n, c, s = (1, 2, 5, 80, 2) if small else (2, 8, 64, 256, 4)
        plan = mc.Constant(c).plan(n * c)
        bank = (normal(b, h, n - 1, k, k, scale=k**-0.5),)
        query, gates = normal(b, h, n, c, k), normal(b, h, n, c, n - 1)
        read = mc.memories.LinearAttention().read
        pairs, item = b * h * n * (n - 1) / 2, jnp.dtype(dtype).itemsize
        rows = b * h * n * c
        found.append(
            Case(
                f"bank_read k={k}",
                lambda how, bank, query, gates, read=read, plan=plan: bank_read(
                    read, bank, query, gates, plan.reads, implementation=how
                ),
                (bank, query, gates),
                2 * pairs * c * k * k,
                item * (2 * rows * k + rows * (n - 1) / 2 + b * h * n * k * k),
            )
        )
        states = jnp.asarray(rng.integers(0, n - 1, (b, h, n, c, s)))
        chosen = normal(b, h, n, c, s)
        found.append(
            Case(
                f"grouped_read k={k} s={s}",
                lambda how, bank, query, gates, read=read, states=states: grouped_read(
                    read, bank, query, gates, states, implementation=how
                ),
                (bank, query, chosen),
                2 * rows * s * k * k,
                item * (2 * rows * s * k + b * h * n * k * k),
            )
        )
        pooled, online = normal(b, h, n - 1, k), normal(b, h, n, c)
        found.append(
            Case(
                f"ssc_route u={k} s={s}",
                lambda how, u, pooled, online, plan=plan, s=s: ssc_route(
                    u, pooled, online, plan.reads, s, implementation=how
                )[:2],
                (query, pooled, online),
                2 * pairs * c * k,
                item * rows * (k + 2 * s),
            )
        )
        tokens = [normal(b, n * c, h, k, scale=k**-0.5) for _ in range(4)]
        for memory in (mc.memories.SSD(), mc.memories.GatedDeltaNet()):
            controls = {
                name: -0.1 * jax.nn.sigmoid(normal(b, n * c, h))
                if name == "log_alpha"
                else jax.nn.sigmoid(normal(b, n * c, h))
                for name in memory.controls
            }
            m, segment = memory.largest_chunk, c if small else 2**30
            found.append(
                Case(
                    f"chunk_update {type(memory).__name__} k={k}",
                    lambda how, q, key, v, u, controls, memory=memory, segment=segment: (
                        mc.memory_caching(
                            *(q, key, v, u),
                            controls=controls,
                            memory=memory,
                            aggregation=mc.Residual(),
                            segmentation=mc.Constant(segment),
                            start="checkpoint",
                            implementation=how,
                        )
                    ),
                    (*tokens, controls),
                    rows * (4 * m * k + 4 * k * k),
                    item * 4 * rows * k,
                )
            )
    return [case for case in found if is_chosen(case.name)]


def is_chosen(name: str) -> bool:
    """Whether a case is to run: all are, or those that have a part of ``--only``."""
    return FLAGS.only is None or any(part in name for part in FLAGS.only)


def passes(case: Case) -> dict[str, Callable]:
    """The forward pass, and forward and backward, as functions of an implementation."""
    import jax
    import jax.numpy as jnp

    def forward(how: str, *arrays: Any) -> Any:
        return case.call(how, *arrays)

    def both(how: str, *arrays: Any) -> Any:
        y, pull = jax.vjp(lambda *arrays: case.call(how, *arrays), *arrays)
        return y, pull(jax.tree.map(jnp.cos, y))

    return {"forward": forward, "backward": both}


def errors() -> Iterator[dict[str, Any]]:
    """Of each kernel the largest error against float64 on the CPU, and whether it is too large."""
    import jax.numpy as jnp

    for dtype in reversed(TOLERANCE):
        for case in cases("small", jnp.dtype(dtype)):
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
    """Notes an error in the row and goes on: one kernel must not cost the others their run."""
    try:
        yield
    except Exception as e:  # compilers raise many kinds
        row["failed"] = " ".join(f"{type(e).__name__}: {e}".split())[:300]


def seconds(function: Callable, *arguments: Any) -> float:
    """Median time of a compiled function."""
    import jax

    times = []
    for _ in range(FLAGS.rounds + 2):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def table() -> Iterator[dict[str, Any]]:
    """Times of every kernel, of XLA, of a matmul, a copy and attention."""
    import jax
    import jax.numpy as jnp

    square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    rate = 2 * 8192**3 / seconds(jax.jit(lambda a: a @ a), square)
    block = jnp.ones((2**28,), jnp.float32)
    bandwidth = 2 * block.nbytes / seconds(jax.jit(lambda a: a + 1), block)
    yield dict(name="matmul 8192, bfloat16", tflops=rate / 1e12)
    yield dict(name="copy 1 GiB", gbytes=bandwidth / 1e9)
    for case in cases("large", jnp.bfloat16):
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
    """Causal flash attention at the sizes of the operations."""
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
    """The Triton kernels of flash-linear-attention at the same sizes, where it is installed."""
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


def lower() -> list[tuple[str, str]]:
    """Lowers every kernel for a GPU that is not there; what each one came to."""
    import jax
    import jax.numpy as jnp

    from memcache_jax.kernels._pallas import lowered_for_gpu

    rows = []
    for case in cases("small", jnp.bfloat16):
        jitted: Any = jax.jit(passes(case)["backward"], static_argnums=0)
        try:
            text = lowered_for_gpu(jitted, "pallas_gpu", *case.arrays)
            rows.append((case.name, "lowered" if "triton" in text else "NO KERNEL"))
        except NotImplementedError as e:
            rows.append((case.name, f"refused: {e}"))
    return rows


def show(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    marks = dict(error="{:.1e}", seconds="{:.3f} ms", xla="XLA {:.3f} ms", tflops="{:.1f} TFLOP/s")
    marks |= dict(of_matmul="{:.0%} of matmul", of_copy="{:.0%} of copy", gbytes="{:.0f} GB/s")
    parts = [f"{row['name']:40} {row.get('kind', ''):9}"]
    for name, mark in marks.items():
        if name in row:
            scale = 1e3 if name in ("seconds", "xla") else 1
            parts.append(mark.format(scale * row[name]))
    if "good" in row:
        parts.append("ok" if row["good"] else "WRONG")
    return "  ".join([*parts, row.get("failed", "")])


def main(argv: list[str]) -> None:
    """Prints errors and times as they come; exits with 1 if a kernel is wrong."""
    del argv
    import jax

    if not any(device.platform == "gpu" for device in jax.devices()):
        for name, what in lower():
            print(f"{name:36} {what}")
        print("\nThere is no GPU here: kernels were lowered for one, and nothing ran.")
        return
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    end = time.monotonic() + 60 * FLAGS.minutes
    rows = []
    for row in itertools.chain(errors(), table()):
        rows.append(row)
        print(show(row), flush=True)
        if FLAGS.json:
            with open(FLAGS.json, "w") as file:
                json.dump(rows, file, indent=2)
        if time.monotonic() > end:
            print(f"Stopped after {FLAGS.minutes} minutes; the rest was not run.")
            break
    if not all(row.get("good", True) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
