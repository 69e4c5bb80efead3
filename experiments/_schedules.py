"""Figures that compilers print of a program: bundles of a TPU's, registers of a GPU's."""

import collections
import re

Figures = dict[str, int]

_BUNDLE = re.compile(
    r"\s*(?:0x)?[0-9a-f]+ +(?P<mark>[A-Z]{2})?\s*: (?P<depth>[> ]*)\{(?P<empty>\})?"
)
_ENTRY = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL
)
_LAUNCH = re.compile(r"(\w+) grid: .*? threads: \[(\d+), .*?shared_memory: (\d+) bytes")


def bundles(text: str) -> Figures:
    """Bundles of a TPU program: all, and those of each loop's body, without the loops inside it.

    The grid is the loop around all others. ``loop 1.2`` is the second loop in the first one.

    Args:
      text: what libtpu writes as final bundles.

    Raises:
      ValueError: if there are none, or some are in a loop that did not begin.
    """
    counts: collections.Counter[str] = collections.Counter()
    begun: collections.Counter[tuple[int, ...]] = collections.Counter()
    loops: tuple[int, ...] = ()  # that began last, from the outermost on: some go on after others
    depth = 0
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if not bundle:
            continue
        if not bundle["empty"]:  # an empty one is written without a depth, and waits for the last
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
    """Of each function the registers of a thread, and the bytes that it stores for want of more.

    Args:
      text: what ``ptxas -v`` prints.
    """
    return {
        name: dict(registers=int(used), spilled=int(spilled))
        for name, spilled, used in _ENTRY.findall(text)
    }


def launches(text: str) -> dict[str, Figures]:
    """Of each GPU program its threads and the bytes of its shared memory.

    Args:
      text: what XLA writes as a thunk sequence.
    """
    return {
        name: dict(threads=int(threads), shared_memory=int(shared))
        for name, threads, shared in _LAUNCH.findall(text)
    }


def changes(
    found: dict[str, Figures], kept: dict[str, Figures], tolerance: float = 0.0
) -> list[str]:
    """What differs between two compilations' figures, in words.

    Args:
      found: figures of kernels.
      kept: those to compare to.
      tolerance: of a figure, in parts of the one that was kept.
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
