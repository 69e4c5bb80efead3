"""The picture of ``experiments.growth``: time per token against the length."""

from typing import Any

from memcache_jax.training.pictures import new_figure, tick_values


def picture(rows: list[dict[str, Any]]) -> Any:
    """Plots microseconds per token by length: axes for each rule, a line for each mixer."""
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    figure, (axes,) = new_figure(len(rules), size=(4.0, 3.4), sharey=True)
    for axis, rule in zip(axes, rules, strict=True):
        mine = [row for row in rows if row["rule"] == rule]
        for mixer in dict.fromkeys(row["mixer"] for row in mine):
            points = [(x["length"], x["us_per_token"]) for x in mine if x["mixer"] == mixer]
            axis.plot(*zip(*points, strict=True), label=mixer)
        axis.set(title=rule, xlabel="tokens of the sequence")
        tick_values(axis, sorted({row["length"] for row in rows}))
    axes[0].set(ylabel="microseconds per token", ylim=(0, None))
    axes[0].legend(fontsize="small")
    return figure
