"""Parses compilers' output: bundles of TPU programs, registers of GPU programs."""

import collections
import re
from collections.abc import Sequence
from typing import Any

Figures = dict[str, int]

_BUNDLE = re.compile(
    r"\s*(?:0x)?[0-9a-f]+ +(?P<mark>[A-Z]{2})?\s*: (?P<depth>[> ]*)\{(?P<empty>\})?"
)
_ENTRY = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL
)
_LAUNCH = re.compile(r"(\w+) grid: .*? threads: \[(\d+), .*?shared_memory: (\d+) bytes")


def bundles(text: str) -> Figures:
    """Counts the bundles of a TPU program: all, and those of each loop's body without inner loops.

    The outermost loop is the grid. ``loop 1.2`` is the second loop inside the first one.

    Args:
      text: the final bundles as written by libtpu.

    Raises:
      ValueError: if there are none, or a loop has no beginning.
    """
    counts: collections.Counter[str] = collections.Counter()
    begun: collections.Counter[tuple[int, ...]] = collections.Counter()
    loops: tuple[int, ...] = ()  # latest loops, outermost first; they go on after inner ones
    depth = 0
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if not bundle:
            continue
        if not bundle["empty"]:  # empty bundles have no depth: they keep the previous one
            depth = bundle["depth"].count(">")
        if bundle["mark"] == "LB":
            outer = loops[: depth - 1]
            begun[outer] += 1
            loops = (*outer, begun[outer])
        if len(loops) < depth:
            raise ValueError(f"expected a loop's body to begin with the mark LB, got {line[:60]!r}")
        counts["bundles"] += 1
        if depth:
            counts["loop " + ".".join(map(str, loops[:depth]))] += 1
    if not counts:
        raise ValueError(f"expected bundles, got {text[:60]!r}")
    return dict(counts)


def registers(text: str) -> dict[str, Figures]:
    """Returns each function's registers per thread, and the bytes that it spills.

    Args:
      text: the output of ``ptxas -v``.
    """
    return {
        name: dict(registers=int(used), spilled=int(spilled))
        for name, spilled, used in _ENTRY.findall(text)
    }


def launches(text: str) -> dict[str, Figures]:
    """Returns each GPU program's threads and bytes of shared memory.

    Args:
      text: the thunk sequence as written by XLA.
    """
    return {
        name: dict(threads=int(threads), shared_memory=int(shared))
        for name, threads, shared in _LAUNCH.findall(text)
    }


def changes(
    found: dict[str, Figures], kept: dict[str, Figures], tolerance: float = 0.0
) -> list[str]:
    """Describes the differences between the figures of two compilations.

    Args:
      found: the new figures of kernels.
      kept: the stored figures.
      tolerance: largest relative difference that counts as equal.
    """
    words = []
    for kernel in sorted({*found, *kept}):
        if kernel not in found or kernel not in kept:
            words.append(f"{kernel}: " + ("new" if kernel in found else "gone"))
            continue
        here, before = found[kernel], kept[kernel]
        for figure in [*here, *(before.keys() - here.keys())]:
            new, old = here.get(figure, 0), before.get(figure, 0)
            if abs(new - old) > tolerance * old:
                words.append(f"{kernel}: {figure} {new}, kept {old}")
    return words


def updated(
    every: dict[str, Any], figures: dict[str, Any], only: Sequence[str] | None
) -> dict[str, Any]:
    """Updates stored figures by chip with new ones; with ``only``, other cases keep theirs.

    Raises:
      ValueError: if kept figures come from another compiler.
    """
    result = dict(every)
    for chip, found in figures.items():
        before = every.get(chip)
        if only and before is not None:
            if before["compiler"] != found["compiler"]:
                raise ValueError(
                    f"the stored figures of {chip} come from {before['compiler']}, the new ones "
                    f"from {found['compiler']}: measure without --only"
                )
            found = found | dict(kernels=before["kernels"] | found["kernels"])
        result[chip] = found
    return result
