"""Changes one part of a model at a time.

    python -m experiments.ablate --config=FILE --workdir=FOLDER

Compares a model with memory caching to variants with one change each: the rows of Table 5 of
arXiv:2602.24281 (position gates, no gates, a linear memory, the query as connector), and choices
that the paper leaves open (segment starts, pooling, segment size, k, chunk size, segmentation).
Trains and tests each as ``experiments.mqar`` does.
"""

from collections.abc import Mapping
from typing import Any

from experiments._recall import measure_recall, recall_config, recall_groups, recall_model
from experiments._study import Row, Study, mean_and_spread, new_figure, run
from memcache_jax.training.pictures import COLORS


def program(config: Any, study: Study) -> None:
    """Measures the models, then writes the table and the picture."""
    whole = recall_model(config, config.models[0], config.widths[0], config.vocab_size)
    models = {"whole": whole}
    models |= {name: changed(whole, parts) for name, parts in config.changes.items()}
    rows = study.measure(recall_groups(config, models), measure_recall, workers=config.workers)
    by_name = {name: [row for row in rows if row["name"] == name] for name in models}
    tests = [f"{length}/{pairs}" for length, pairs in config.test]
    study.write_table(
        [config.models[0], *(f"L / K = {t}" for t in tests)],
        [
            [name, *(mean_and_spread([row["accuracy"][t] for row in mine]) for t in tests)]
            for name, mine in by_name.items()
        ],
    )
    study.write_picture(picture(by_name, tests[-1]), "ablate")


def changed(model: Mapping[str, Any], parts: Any) -> dict[str, Any]:
    """Returns a ``config.model`` with the keys in ``parts`` replaced.

    Raises:
      ValueError: for unknown keys.
    """
    parts = parts.to_dict() if hasattr(parts, "to_dict") else dict(parts)
    if unknown := sorted(parts.keys() - model.keys()):
        raise ValueError(
            f"changes must have keys of {', '.join(sorted(model))}; got {', '.join(unknown)}"
        )
    return {**model, **parts}


def picture(rows: dict[str, list[Row]], test: str) -> Any:
    """Draws a bar for each model, with the range over seeds."""
    figure, ((axis,),) = new_figure(1, size=(7.0, 1.0 + 0.3 * len(rows)))
    values = [[row["accuracy"][test] for row in mine] for mine in rows.values()]
    means = [sum(v) / len(v) for v in values]
    below = [mean - min(v) for mean, v in zip(means, values, strict=True)]
    above = [max(v) - mean for mean, v in zip(means, values, strict=True)]
    whole, changed = COLORS[0], COLORS[6]
    colors = [whole, *[changed] * (len(rows) - 1)]
    axis.barh(list(rows), means, xerr=[below, above], color=colors)
    axis.axvline(means[0], color=whole, linestyle="--", linewidth=1)
    axis.grid(visible=False, axis="y")
    axis.invert_yaxis()
    length, pairs = test.split("/")
    axis.set(xlabel="accuracy", title=f"L = {length}, K = {pairs}")
    return figure


if __name__ == "__main__":
    run(program, (*recall_config(), "changes"))
