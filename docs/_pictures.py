"""Draws the pictures of these pages from the tables beside them, in the style of the programs.

    python docs/_pictures.py [recall ablate extrapolate throughput growth states]

Run from the repository. What is measured is read from docs/studies.md and experiments/LOG.md, so
that a picture shows what its table says. ``states`` is counted. Two pictures are their programs'
own: needle.png has more numbers than its table, and gates.png is from the tutorial on
``experiments.inspect``.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import memcache_jax as mc  # noqa: E402
from experiments import ablate as of_ablate  # noqa: E402
from experiments import extrapolate as of_extrapolate  # noqa: E402
from experiments import mqar as of_mqar  # noqa: E402
from experiments import throughput as of_throughput  # noqa: E402
from experiments._growth_picture import picture as of_growth  # noqa: E402
from memcache_jax.training.pictures import new_figure, tick_values  # noqa: E402


def cells_of(page: str, title: str) -> list[list[str]]:
    """Returns the cells of the first table below a title, its header first."""
    text = (DOCS / page).read_text()
    below = text[re.search(rf"^##.*{re.escape(title)}", text, re.M).end() :]  # type: ignore
    lines = re.search(r"(^\|.*\n)+", below, re.M)[0].splitlines()  # type: ignore
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [header, *rows]


def table(page: str, title: str) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the header of the first table below a title, and its rows by their first cell."""
    header, *rows = cells_of(page, title)
    return header[1:], {name: cells for name, *cells in rows}


def number(cell: str) -> float:
    """Returns the number that a cell begins with."""
    return float(re.match(r"[\d,.]+", cell)[0].replace(",", ""))  # type: ignore


def of_seeds(cell: str) -> list[float]:
    """Returns the results of two seeds from their mean and half their range."""
    mean, spread = map(float, cell.split(" ± "))
    return [mean - spread, mean + spread]


def recalled(title: str) -> tuple[list[str], dict[str, list[dict[str, Any]]]]:
    """Returns the tests of a table of recall, and the rows of each model, one for each seed."""
    header, rows = table("studies.md", title)
    tests = ["/".join(re.findall(r"\d+", test)) for test in header if test.startswith("L =")]
    found = {}
    for name, cells in rows.items():
        seeds = zip(*(of_seeds(cell) for cell in cells[: len(tests)]), strict=True)
        found[name] = [dict(accuracy=dict(zip(tests, seed, strict=True))) for seed in seeds]
        for row in found[name] if len(cells) > len(tests) else []:
            row["state_bytes"] = {"256": number(cells[-1])}
    return tests, found


def recall() -> Any:
    """Accuracy of SSD and attention by test and by bytes."""
    tests, rows = recalled("Associative recall")
    names = {name: name.split(", ")[0] for name in rows}
    config = SimpleNamespace(widths=[64], models=list(names.values()))
    rows = {f"{names[name]} d=64": mine for name, mine in rows.items()}
    return of_mqar.picture(config, rows, tests, "256")


def ablate() -> Any:
    """Accuracy of a layer with one part changed at a time, on the hardest test."""
    tests, rows = recalled("One part changed at a time")
    return of_ablate.picture(rows, tests[-1])


def extrapolate() -> Any:
    """Bits per byte by position, after training on 256 tokens."""
    header, rows = table("studies.md", "Past the training length")
    ends = [int(number(title.removeprefix("to "))) for title in header]
    bins = list(zip([ends[0] // 2, *ends], ends, strict=False))
    return of_extrapolate.picture(
        [
            dict(
                name=name,
                bins=[(*edges, number(cell)) for edges, cell in zip(bins, cells, strict=True)],
                training=dict(sequence_length=256),
            )
            for name, cells in rows.items()
        ]
    )


def throughput() -> Any:
    """Training speed by length, and the time of a decoded token; caches are of one length only."""
    header, rows = table("../experiments/LOG.md", "training and decoding speed")
    found = []
    for name, cells in rows.items():
        *trained, first, last, _ = map(number, cells)
        found += [
            dict(
                name=name, what="train", tokens=int(number(length)), tokens_per_second=1000 * speed
            )
            for length, speed in zip(header[:-3], trained, strict=True)
        ]
        found += [
            dict(name=name, what="decode", tokens=512, ms=first),
            dict(name=name, what="decode", tokens=4096, ms=last),
        ]
    return of_throughput.picture(found)


def growth() -> Any:
    """Time per token against the length, of each rule and mixer."""
    header, *rows = cells_of("../experiments/LOG.md", "growth with the length, quiet")
    lengths = [int(number(title.removeprefix("T = "))) for title in header[2::2]]
    rule, found = "", []
    for named, mixer, *cells in rows:
        rule = named or rule
        found += [
            dict(rule=rule, mixer=mixer.replace("`", ""), length=length, us_per_token=number(cell))
            for length, cell in zip(lengths, cells[::2], strict=True)
        ]
    return of_growth(found)


def states() -> Any:
    """Reads of a token by its position, counted from the plans of the segmentations."""
    size, lengths = 256, [2**i for i in range(8, 18)]

    def visible(segmentation: Any, length: int) -> int:
        return int((segmentation.plan(length).reads[-1] >= 0).sum()) + 1

    constant = [visible(mc.Constant(size), length) for length in lengths]
    lines = {
        "attention: tokens": lengths,
        "Constant(256), GRM": constant,
        "Logarithmic(256), GRM": [visible(mc.Logarithmic(size), length) for length in lengths],
        "Constant(256), SSC(4)": list(np.minimum(constant, 5)),
        "no caches": [1] * len(lengths),
    }
    figure, ((axis,),) = new_figure(1, size=(6.5, 4))
    for name, counts in lines.items():
        axis.plot(lengths, counts, label=name)
    tick_values(axis, lengths[::2])
    axis.set(yscale="log", xlabel="tokens so far", ylabel="states (or tokens) that one token reads")
    figure.legend(loc="outside right center")
    return figure


if __name__ == "__main__":
    drawn = dict(
        recall=recall,
        ablate=ablate,
        extrapolate=extrapolate,
        throughput=throughput,
        growth=growth,
        states=states,
    )
    for name in sys.argv[1:] or drawn:
        drawn[name]().savefig(DOCS / f"{name}.png", dpi=120)
        print(f"written: docs/{name}.png")
