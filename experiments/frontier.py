"""Compares cache components at equal cache bytes and training steps.

    python -m experiments.frontier --config=configs/frontier.py --workdir=FOLDER

Trains the first model and one for each of ``config.changes`` on associative recall (MQAR), light
needles and text, as ``experiments.mqar``, ``needle`` and ``extrapolate`` do. At the longest length
that a part tests, only models in ``config.unbounded`` may have a larger cache than the first;
``Constant`` segments without a size get the smallest size that fits.

All models train for the same number of steps, with every seed. Recall shows whether more steps
still help: the first seed also trains for half as many, on a schedule of its own. A model has
settled if the longer run gains at most ``config.settled`` accuracy on ``config.target``. ``closed``
is the share of the gap in that accuracy between the first model and ``config.against`` that a model
closes.

The workdir gets ``results.json``, ``recall.md``, ``needles.md``, ``text.md`` and ``frontier.png``.
The same command resumes an interrupted study; ``config.parts`` names the parts to run.
"""

import bisect
import math
import re
from collections.abc import Mapping
from typing import Any

from experiments import extrapolate, needle
from experiments._needles import LITE_VOCABULARY
from experiments._recall import (
    groups,
    measure_recall,
    model_and_cache,
    recall_config,
    recall_groups,
    recall_model,
    state_bytes,
)
from experiments._study import Case, Row, Study, mean_and_spread, run
from experiments.ablate import changed, picture
from memcache_jax.training.config import to_json

_OWN = ("changes", "unbounded", "against", "target", "settled", "parts", "needles", "text")
PARTS = ("recall", "needles", "text")


def program(config: Any, study: Study) -> None:
    """Measures all parts, then writes the tables and the picture."""
    if unknown := sorted(set(config.parts) - set(PARTS)):
        raise ValueError(f"parts must be of {', '.join(PARTS)}, got {unknown[0]}")
    for part in config.parts:
        dict(recall=_recall, needles=_needles, text=_text)[part](config, study)


def models_in(
    whole: Mapping[str, Any], changes: Mapping[str, Any], unbounded: Any, length: int
) -> dict[str, dict[str, Any]]:
    """The models by name, each with a cache that is no larger than the first's.

    Args:
      whole: the ``config.model`` of the first.
      changes: for each other model, the keys that it replaces, and ``cache``, options of
        ``init_cache`` with which it is evaluated as a stream.
      unbounded: the names of the models that may take more bytes.
      length: tokens of the stream whose cache is measured.

    Raises:
      ValueError: for unknown keys, or a model that takes more bytes.
    """
    most = _bytes(whole, length)
    models = {"whole": dict(whole)}
    for name, parts in changes.items():
        parts = parts.to_dict() if hasattr(parts, "to_dict") else dict(parts)
        cache = {"cache": parts.pop("cache")} if "cache" in parts else {}
        options = fitted(changed(whole, parts) | cache, most, length)
        size = _bytes(options, length)
        if size > most and name not in unbounded:
            raise ValueError(
                f"the cache of {name} takes {size:,} bytes at {length} tokens, above the {most:,} "
                "of the first model"
            )
        models[name] = options
    return models


def fitted(options: dict[str, Any], most: int, length: int) -> dict[str, Any]:
    """A ``config.model`` whose ``Constant`` segments have a size: the smallest that fits.

    Args:
      options: of the model.
      most: bytes that its cache may take.
      length: tokens of the stream.
    """
    segmentation = dict(options["segmentation"])
    if segmentation != {"name": "Constant"}:
        return options

    def sized(size: int) -> dict[str, Any]:
        return options | dict(segmentation=segmentation | dict(size=size))

    chunk, aggregation = dict(options["memory"]).get("chunk_size") or 1, options["aggregation"]
    step = math.lcm(chunk, aggregation.get("num_keys", 1))
    least = -(-max(1, aggregation.get("exact", 0)) // step) * step

    def fits(size: int) -> bool:
        return _bytes(sized(size), length) <= most

    # By doubling: with exact tokens, long segments take more again, for the live one's tokens.
    high = least
    while high < length and not fits(high):
        high *= 2
    sizes = range(max(least, high // 2 // step * step), high, step)
    return sized([*sizes, high][bisect.bisect_left(sizes, True, key=fits)])


def _bytes(options: Mapping[str, Any], length: int) -> int:
    model, cache = model_and_cache(options)
    return state_bytes(model, length, cache)


def _recall(config: Any, study: Study) -> None:
    longest = max(length for length, _ in config.test)
    whole = recall_model(config, config.models[0], config.widths[0], config.vocab_size)
    models = models_in(whole, config.changes, config.unbounded, longest)
    half = config.copy_and_resolve_references()
    half.steps, half.seeds = config.steps // 2, config.seeds[:1]
    rows = study.measure(recall_groups(config, models), measure_recall, workers=config.workers)
    halves = study.measure(recall_groups(half, models), measure_recall, workers=config.workers)
    names = {name: _named(config, name) for name in models}
    by_name = {names[name]: [row for row in rows if row["name"] == name] for name in models}
    shorter = {names[row["name"]]: row["accuracy"][config.target] for row in halves}
    mean = {name: _mean(mine, config.target) for name, mine in by_name.items()}
    first, last = mean[names["whole"]], mean[config.against]
    tests = [f"{length}/{pairs}" for length, pairs in config.test]
    table = []
    for name, mine in by_name.items():
        accuracies = [mean_and_spread([row["accuracy"][test] for row in mine]) for test in tests]
        gain = mine[0]["accuracy"][config.target] - shorter[name]
        closed = (mean[name] - first) / (last - first) if last > first else math.nan
        settled = "yes" if gain <= config.settled else "no"
        size = f"{mine[0]['state_bytes'][str(longest)]:,}"
        table.append([name, *accuracies, f"{closed:.2f}", f"{gain:+.3f}", settled, size])
    study.write_table(
        [
            *("model", *(f"L / K = {test}" for test in tests), f"closed of {config.target}"),
            *("gain over half the steps", "settled", f"bytes at {longest}"),
        ],
        table,
        "recall",
    )
    study.write_picture(picture(by_name, config.target), "frontier")


def _needles(config: Any, study: Study) -> None:
    part = config.needles
    whole = recall_model(part, config.models[0], part.width, LITE_VOCABULARY)
    models = models_in(whole, config.changes, config.unbounded, max(part.lengths))
    cases = groups(part, models, needle.TASK)
    rows = study.measure(cases, needle.measure_light, workers=part.workers)
    table = []
    for name in models:
        mine = [row["accuracy"] for row in rows if row["name"] == name]
        found = [[sum(grid[i]) / len(grid[i]) for grid in mine] for i in range(len(mine[0]))]
        table.append([_named(config, name), *map(mean_and_spread, found)])
    study.write_table(["model", *(f"{n} tokens" for n in part.lengths)], table, "needles")


def _text(config: Any, study: Study) -> None:
    part = config.text
    whole = changed(to_json(part.training)["model"], part.first)
    changes = dict(config.changes.items()) | dict(part.changes.items())
    models = models_in(whole, changes, config.unbounded, part.eval_length)
    cases: list[list[Case]] = []
    for name, options in models.items():
        for seed in part.seeds:
            model = {key: value for key, value in options.items() if key != "cache"}
            training = to_json(part.training) | dict(model=model, seed=seed)
            folder = re.sub(r"\W+", "_", f"{name}_{seed}")
            sizes = {key: part[key] for key in ("eval_length", "eval_tokens", "first_bin")}
            case = dict(name=name, trained=folder, training=training, post=None, **sizes)
            cases.append([case | dict(cache=options.get("cache"))])

    def measure(cases: list[Case]) -> list[Row]:
        return extrapolate.measure(cases, study.workdir / "models" / cases[0]["trained"], part)

    rows = study.measure(cases, measure)
    table = []
    for name in models:
        bins = [row["bins"] for row in rows if row["name"] == name]
        bits = [[mine[i][2] for mine in bins] for i in range(len(bins[0]))]
        table.append([_named(config, name), *map(mean_and_spread, bits)])
    ends = [f"bits per byte to {end}" for _, end, _ in rows[0]["bins"]]
    study.write_table(["model", *ends], table, "text")


def _mean(rows: list[Row], test: str) -> float:
    return sum(row["accuracy"][test] for row in rows) / len(rows)


def _named(config: Any, name: str) -> str:
    return config.models[0] if name == "whole" else name


if __name__ == "__main__":
    run(program, (*recall_config(), *_OWN))
