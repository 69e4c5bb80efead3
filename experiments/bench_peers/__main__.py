"""Compares our layers and kernels to those of other libraries, and prints ratios.

    python -m experiments.bench_peers [--only=memory-caching,tokamax] [--quick] [--rounds=5]

On a CPU, gradients of layers beside memory-caching, titans-pytorch and attention of PyTorch, by
processor time on one core, in turn. For TPUs, without one, kernels beside deltanet-tpu and tokamax,
by what one compiler counts. On an NVIDIA GPU beside flash-linear-attention. Each
library is installed into an environment of its own below --folder, where it stays: 3 GB for a CPU
and TPUs, with Python 3.12 for the latter. A row whose library cannot be installed says so.

Hardware: a CPU core. Compiling ours for TPUs, with gradients, takes minutes a row.
"""

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags

from experiments._compilers import TPUS
from experiments._program import run
from experiments.bench_peers import _rows
from experiments.bench_peers._environments import NoEnvironmentError, environment, pins
from experiments.bench_peers._worker import Worker, WorkerError

_ONLY = flags.DEFINE_list("only", None, "Parts of the rows' names, such as tokamax or cpu.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds.", 1)
_QUICK = flags.DEFINE_bool("quick", False, "A quarter of the tokens.")
_CHIPS = flags.DEFINE_list("chips", ["v5e", "v6e"], "TPUs to compile for.")
_CORE = flags.DEFINE_integer("core", -1, "CPU core of the timed processes; the last by default.")
_FOLDER = flags.DEFINE_string(
    "folder", "~/.cache/memcache_jax/peers", "Where environments are made and kept."
)

_CPU_SIZES = dict(length=1024, features=256, heads=4, segment=128, chunk=32)
_RULE_SIZES = dict(length=8192, heads=16, dim=128)
_SMALL = dict(length=64, heads=1, dim=128)
_FAILURES = (NoEnvironmentError, WorkerError, ValueError)


def main() -> None:
    """Compares on each kind of device that rows are chosen for."""
    _core()
    if unknown := set(_CHIPS.value) - set(TPUS):
        raise ValueError(f"chips must be of {', '.join(TPUS)}, got {', '.join(sorted(unknown))}")
    found = [compare() for compare in (_on_cpu, _for_tpus, _on_gpu)]
    if not any(found):
        every = ", ".join(_name("cpu", p) for p in _rows.CPU)
        raise ValueError(f"--only={','.join(_ONLY.value or ())} matches no row, such as {every}")


def _core() -> int | None:
    """The core of timed processes; None where processes cannot be kept on one."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    if not -len(cores) <= _CORE.value < len(cores):
        raise ValueError(f"--core must be below the {len(cores)} cores, got {_CORE.value}")
    return cores[_CORE.value]


def _name(device: str, pair: _rows.Pair) -> str:
    return f"{device}: {pair.name} / {pair.peer}"


def _chosen(device: str, pairs: tuple[_rows.Pair, ...]) -> list[_rows.Pair]:
    """The rows whose names contain one of ``--only``; spaces do not count."""

    def short(text: str) -> str:
        return text.replace(" ", "")

    only = None if _ONLY.value is None else [short(part) for part in _ONLY.value]
    names = {pair: short(_name(device, pair)) for pair in pairs}
    return [pair for pair in pairs if only is None or any(part in names[pair] for part in only)]


def _sizes(of: dict[str, int]) -> dict[str, int]:
    return {**of, "length": of["length"] // 4} if _QUICK.value else of


def _folder() -> Path:
    return Path(_FOLDER.value).expanduser()


def _told(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _show(title: str, head: tuple[str, ...], rows: list[list[str]]) -> None:
    print(f"\n{title}\n", *_rows.table(head, rows), sep="\n", flush=True)


def _attempt(compare: Callable[[], list[str]], width: int) -> list[str]:
    """The cells of a row; if there is no such library or it fails, why."""
    try:
        return compare()
    except _FAILURES as e:
        return ["-"] * (width - 1) + [f"none: {' '.join(str(e).split())}"]


def _on_cpu() -> int:
    pairs, sizes = _chosen("cpu", _rows.CPU), _sizes(_CPU_SIZES)
    if not pairs:
        return 0
    versions, rows = pins("torch"), []
    for pair in pairs:
        cells = _attempt(functools.partial(_time_on_cpu, pair, sizes), 4)
        rows.append([pair.name, f"{pair.peer} {versions[pair.peer]}", *cells])
        print(f"{pair.name}: {cells[0]}", file=sys.stderr, flush=True)
    head = ("layer", "peer", "its time / ours", "mark", "output", "where they differ")
    title = f"Gradients on one CPU core, float32, {_told(sizes)}, {_ROUNDS.value} rounds in turn:"
    _show(title, head, rows)
    return len(rows)


def _time_on_cpu(pair: _rows.Pair, sizes: dict[str, int]) -> list[str]:
    """A row: workers end with it, so that only two are there at once."""
    output = "same shape"
    python = environment("torch", _folder(), newest="3.12")  # memory-caching takes no newer one
    with _workers((sys.executable, "ours"), (python, "torch_cpu"), core=_core()) as (ours, peer):
        times = _rows.timed(pair, ours, peer, _ROUNDS.value, **sizes)
        if pair.theirs == "linear GRM":
            saved = dict(length=24, features=16, heads=2, segment=8)
            output = f"{_rows.error(ours, peer, saved, segment=8):.0e} apart, same q, k, v, u"
    return [f"{times:.1f}", f"{pair.mark or ''}", output, pair.note]


@contextlib.contextmanager
def _workers(
    *of: tuple[str, str], core: int | None, platforms: str = "cpu"
) -> Iterator[list[Worker]]:
    """Processes of interpreters and modules, which end together."""
    around = dict(JAX_PLATFORMS=platforms, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Worker(*one, core, around)) for one in of]


def _for_tpus() -> int:
    pairs, sizes = _chosen("tpu", _rows.TPU), _sizes(_RULE_SIZES)
    versions, rows = pins("tpu"), []
    for chip in _CHIPS.value if pairs else ():
        rows += _compile_for(chip, pairs, sizes)
    if not rows:
        return 0
    head = ("rule", "chip", "peer", "pass", "HBM bytes", "temporaries", "seconds", "output", "note")
    packages = ", ".join(f"{name} {versions[name]}" for name in ("jax", "libtpu"))
    _show(f"Ours / the peer's, compiled by {packages}, bfloat16, {_told(sizes)}:", head, rows)
    return len(rows)


def _compile_for(chip: str, pairs: list[_rows.Pair], sizes: dict[str, int]) -> list[list[str]]:
    """The rows of a chip: a process can compile for a single kind of TPU."""
    versions, rows = pins("tpu"), []
    try:
        python = environment("tpu", _folder(), oldest="3.12")
    except NoEnvironmentError as e:
        return [[p.name, chip, p.peer, *["-"] * 5, f"none: {e}"] for p in pairs]
    with _workers((python, "tpu"), core=None) as (worker,):
        for pair in pairs:
            for gradient in (False, True):
                compare = functools.partial(_compile, pair, worker, chip, gradient, sizes)
                which = "gradient" if gradient else "forward"
                peer = f"{pair.peer} {versions[pair.peer]}"
                rows.append([pair.name, chip, peer, which, *_attempt(compare, 5)])
                print(*rows[-1], file=sys.stderr, flush=True)
    return rows


def _compile(
    pair: _rows.Pair, worker: Worker, chip: str, gradient: bool, sizes: dict[str, int]
) -> list[str]:
    *figures, note = _rows.compiled(pair, worker, chip, gradient, **sizes)
    if pair.ours not in pair.theirs:
        return [*figures, "same shape", note]
    return [*figures, f"{worker.call('error', pair.theirs, **_SMALL):.0e} apart", note]


def _on_gpu() -> int:
    pairs, sizes = _chosen("gpu", _rows.GPU), _sizes(_RULE_SIZES)
    if not pairs:
        return 0
    if not shutil.which("nvidia-smi"):
        print(f"\n{pairs[0].peer}: no row, since there is no NVIDIA GPU here (no nvidia-smi).")
        return len(pairs)
    rows = []
    for pair in pairs:
        cells = _attempt(functools.partial(_time_on_gpu, pair, sizes), 3)
        rows.append([pair.name, f"{pair.peer} {pins('gpu')[pair.peer]}", *cells])
    head = ("rule", "peer", "its time / ours", "output", "note")
    _show(f"Gradients on a GPU, bfloat16, {_told(sizes)}, {_ROUNDS.value} rounds:", head, rows)
    return len(rows)


def _time_on_gpu(pair: _rows.Pair, sizes: dict[str, int]) -> list[str]:
    both = (sys.executable, "gpu"), (environment("gpu", _folder()), "fla")
    with _workers(*both, core=None, platforms="cuda") as (ours, peer):
        times = _rows.timed(pair, ours, peer, _ROUNDS.value, **sizes)
        apart = _rows.error(ours, peer, dict(case=pair.theirs, **_SMALL))
    return [f"{times:.2f}", f"{apart:.0e} apart", pair.note]


if __name__ == "__main__":
    run(main)
