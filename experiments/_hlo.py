"""Counts the collectives that a compiled program runs, and the bytes that they move."""

import re
from collections import defaultdict
from typing import Any

import jax

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_OPERATION = re.compile(
    rf"= (?P<shape>.*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\((?P<arguments>.*?)\)"
)
_CALLED = re.compile(r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_OF_CHAIN, _CHAIN_ENDS = "frontend_attributes={chain_id=", '"AsyncCollectiveDone"'
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


def printed(compiled: Any) -> str:
    """Returns the text of a compiled program.

    Raises:
      NotImplementedError: if XLA cannot print it. jaxlib 0.10 cannot read back programs that run
        gathers on the sparse cores of a TPU v5p or v6e, though it compiles them.
    """
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as e:
        reason = str(e).splitlines()[0]
        raise NotImplementedError(f"the program compiles, but XLA cannot print it: {reason}") from e


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns, for each kind of collective, how often one call runs it and its total bytes.

    Bytes are those of the results on one device. A loop's body counts once per trip. A TPU program
    names a collective in each of the fusions beside which it runs, as one chain: the last counts.

    Args:
      text: the compiled program, as ``printed`` returns it.
    """
    lines, entry = _computations(text)
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def visit(name: str, times: int) -> None:
        ends = any(_CHAIN_ENDS in line for line in lines.get(name, ()))
        for line in lines.get(name, ()):
            if (match := _OPERATION.search(line)) and (ends or _OF_CHAIN not in line):
                total = totals[match["kind"]]
                total[0] += times
                total[1] += times * _result_bytes(match["shape"], bool(match["start"]))
            trips = _TRIPS.search(line)
            inside = times * int(trips[1]) if trips and " while(" in line else times
            for called in _CALLED.findall(line):
                visit(called, inside)

    visit(entry, 1)
    return {kind: (count, size) for kind, (count, size) in sorted(totals.items())}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the entry computation."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            lines[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            lines[name].append(line)
    return lines, entry


def _result_bytes(shape: str, starts: bool) -> int:
    """Returns the bytes of a result; the shape of a ``-start`` also lists its operands."""
    sizes = []
    for kind, dims in _ARRAY.findall(shape):
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 8)
        size = bits // 8
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        sizes.append(size)
    return max(sizes, default=0) if starts else sum(sizes)
