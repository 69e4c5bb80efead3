"""What is compared, and the table's rows."""

import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol


class Callee(Protocol):
    """A worker."""

    def call(self, function: str, *arguments: Any, **named: Any) -> Any:
        """Returns what a function of its module returns."""
        ...


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two jobs of the same sizes.

    Attributes:
      name: of the row.
      ours: our job.
      peer: the peer's package.
      theirs: its job.
      note: where the two differ.
      mark: how many times as fast ours must be, if that is set.
    """

    name: str
    ours: str
    peer: str
    theirs: str
    note: str
    mark: int | None = None


_BLOCK = "ours also has convolutions, norms of q and k, and an output gate"
_MEMORY = "its memory has biases and no residual; it begins at zero, where keys have no effect"
CPU = (
    Pair("linear + GRM", "linear GRM", "memory-caching", "linear GRM", _BLOCK, 75),
    Pair("Titans + GRM", "Titans GRM", "memory-caching", "Titans GRM", _MEMORY, 40),
    Pair(
        *("Titans", "Titans", "titans-pytorch", "Titans, first"),
        note="all its gradients are at the first state; decay and momentum by chunk",
        mark=3,
    ),
    Pair(
        *("Titans, anchored", "Titans", "titans-pytorch", "Titans, anchored"),
        note="gradients at each chunk's start in both; its decay and momentum are by chunk",
    ),
    Pair("attention", "attention", "torch", "attention", "ours also rotates q and k"),
    Pair("linear + GRM, attention", "linear GRM", "torch", "attention", "another mixer"),
)
GPU = tuple(
    Pair(f"{rule}, {kind}", f"{rule}, {kind}", "flash-linear-attention", rule, "")
    for rule in ("GatedDeltaNet", "KDA")
    for kind in ("xla", "pallas_gpu")
)
TPU = (
    Pair("GatedDeltaNet", "GatedDeltaNet", "deltanet-tpu", "deltanet-tpu GatedDeltaNet", ""),
    Pair("KDA", "KDA", "deltanet-tpu", "deltanet-tpu KDA", ""),
    Pair("KDA", "KDA", "tokamax", "tokamax KDA", "its arrays have heads first"),
    Pair(
        *("GatedDeltaNet", "GatedDeltaNet", "tokamax", "tokamax KDA"),
        note="KDA, whose decay has a key channel's size, is more work",
    ),
)


def timed(pair: Pair, ours: Callee, peer: Callee, rounds: int, **sizes: int) -> float:
    """How many times as long the peer takes: medians of rounds that begin with either in turn.

    Raises:
      ValueError: if the outputs differ in shape.
    """
    jobs = [(ours, pair.ours), (peer, pair.theirs)]
    shapes = [worker.call("prepare", job, **sizes) for worker, job in jobs]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs of {shapes[0]} and {shapes[1]} are not comparable")
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(rounds):
        for name, (worker, job) in list(zip(seconds, jobs, strict=True))[:: (-1) ** turn]:
            seconds[name].append(worker.call("seconds", job))
    return statistics.median(seconds["peer"]) / statistics.median(seconds["ours"])


def error(ours: Callee, peer: Callee, saved: dict[str, Any], **how: int) -> float:
    """How far ours is from a peer's output for the peer's own arrays.

    Args:
      ours: our worker, whose ``error`` compares.
      peer: the peer's, whose ``save`` writes arrays.
      saved: arguments of ``save``.
      **how: arguments of ``error``.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "arrays.npz")
        peer.call("save", path, **saved)
        return ours.call("error", path, **how)


def compiled(pair: Pair, worker: Callee, chip: str, gradient: bool, **sizes: int) -> list[str]:
    """Ratios of ours to the peer's (HBM bytes, temporaries, compile seconds), and a note."""
    cases = (pair.ours, pair.theirs)
    ours, peer = (worker.call("compiled", case, chip, gradient, **sizes) for case in cases)
    figures = [ratio(ours[key], peer[key]) for key in ("bytes", "temporaries", "seconds")]
    loops = f"bytes count {ours['loops']} loops of ours and {peer['loops']} of its once"
    notes = [pair.note, loops if ours["loops"] or peer["loops"] else ""]
    return [*figures, "; ".join(filter(None, notes))]


def ratio(ours: float, peer: float) -> str:
    """A ratio, if there is one."""
    return f"{ours / peer:.2f}" if peer else "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)
