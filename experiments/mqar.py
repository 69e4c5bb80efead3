"""Trains and tests associative recall (MQAR).

    python -m experiments.mqar --config=FILE --workdir=FOLDER

Trains models to recall the values of keys (MQAR, arXiv:2312.04927), and tests them at other lengths
and numbers of pairs, including larger ones. For each model it reports the learning rate with the
best mean over seeds. The workdir gets ``results.json``, ``table.md`` and ``mqar.png``. The same
command resumes an interrupted study, and measures only what is new when models, widths, learning
rates or seeds are added.
"""

from typing import Any

from experiments._recall import best, measure_recall, recall_config, recall_groups, recall_model
from experiments._study import Row, Study, mean_and_spread, new_figure, run
from memcache_jax.training.pictures import look, tick_values


def program(config: Any, study: Study) -> None:
    """Measures the models, then writes the table and the picture."""
    models = {
        f"{name} d={width}": recall_model(config, name, width, config.vocab_size)
        for width in config.widths
        for name in config.models
    }
    rows = best(
        study.measure(recall_groups(config, models), measure_recall, workers=config.workers)
    )
    tests = [f"{length}/{pairs}" for length, pairs in config.test]
    longest = str(max(length for length, _ in config.test))
    study.write_table(
        ["model", "learning rate", *(f"L / K = {t}" for t in tests), f"bytes at {longest}"],
        [
            [
                name,
                mine[0]["learning_rate"],
                *(mean_and_spread([row["accuracy"][test] for row in mine]) for test in tests),
                f"{mine[0]['state_bytes'][longest]:,}",
            ]
            for name, mine in rows.items()
        ],
    )
    study.write_picture(picture(config, rows, tests, longest), "mqar")


def picture(config: Any, rows: dict[str, list[Row]], tests: list[str], longest: str) -> Any:
    """Plots accuracy by test at the largest width, by bytes of state, and by width."""
    figure, (axes,) = new_figure(3 if len(config.widths) > 1 else 2)
    by_test, by_bytes, *by_width = axes
    hardest = tests[-1]
    length, pairs = hardest.split("/")
    for number, model in enumerate(config.models):
        widest = rows[f"{model} d={config.widths[-1]}"]
        _line(
            by_test, range(len(tests)), [[r["accuracy"][t] for r in widest] for t in tests], number
        )
        by_test.lines[-1].set_label(model)
        of_widths = [rows[f"{model} d={width}"] for width in config.widths]
        hard = [[row["accuracy"][hardest] for row in mine] for mine in of_widths]
        for axis in by_width:
            _line(axis, config.widths, hard, number)
        _line(by_bytes, [mine[0]["state_bytes"][longest] for mine in of_widths], hard, number)
    by_test.set_xticks(range(len(tests)), [f"L={t.replace('/', chr(10) + 'K=')}" for t in tests])
    by_test.set(ylabel="accuracy", title=f"d = {config.widths[-1]}")
    figure.legend(loc="outside right center")
    for axis in by_width:
        axis.set(xlabel="model dimension d", title=f"L = {length}, K = {pairs}")
        tick_values(axis, config.widths)
    by_bytes.set(xlabel=f"bytes of state at {longest} tokens", xscale="log")
    by_bytes.set_title(f"L = {length}, K = {pairs}")
    for axis in axes:
        axis.set_ylim(-0.02, 1.02)
    return figure


def _line(axis: Any, x: Any, values: list[list[float]], number: int) -> None:
    """Plots means, with the range over seeds."""
    means = [sum(v) / len(v) for v in values]
    how = look(number)
    axis.plot(x, means, **how)
    low, high = ([extreme(v) for v in values] for extreme in (min, max))
    axis.fill_between(x, low, high, color=how["color"], alpha=0.15, linewidth=0)


if __name__ == "__main__":
    run(program, recall_config().keys())
