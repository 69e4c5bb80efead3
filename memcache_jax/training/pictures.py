"""One style for every picture: lines differ in lightness, marker and dashes, so gray will do."""

from collections.abc import Sequence
from typing import Any

# From dark to light, then again in other hues; each has a marker and dashes of its own.
COLORS = ("#0b3c6f", "#b8432b", "#2aa08f", "#e3a51a", "#6a3d9a", "#4d4d4d", "#8ab6e0", "#8c5a2b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MAP = "cividis"  # of images: lighter is more, in gray too


def look(number: int) -> dict[str, Any]:
    """Returns the color, marker and line style of a picture's line, by its number from 0.

    Example:
      >>> look(0)
      {'color': '#0b3c6f', 'marker': 'o', 'linestyle': '-'}
    """
    return dict(
        color=COLORS[number % len(COLORS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle=DASHES[number % len(DASHES)],
    )


def new_figure(
    columns: int, rows: int = 1, *, size: tuple[float, float] = (4.8, 3.6), **options: Any
) -> tuple[Any, Any]:
    """Returns a matplotlib figure that needs no display, and its axes.

    Lines that are plotted without a format get the looks of ``look``, one after the other.

    Args:
      columns: axes side by side.
      rows: axes one below the other.
      size: width and height of each axes, in inches.
      **options: of ``Figure.subplots``, such as ``sharey``.

    Returns:
      The figure, and an array (rows, columns) of axes.
    """
    # Takes a second to import, and most callers never plot.
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    looks = [look(number) for number in range(len(COLORS))]
    style: Any = {
        "axes.prop_cycle": cycler(**{name: [one[name] for one in looks] for name in looks[0]}),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#d8dde6",
        "grid.linewidth": 0.6,
        "lines.markersize": 5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def tick_values(axis: Any, x: Sequence[float], *, base: int = 2) -> None:
    """Makes the x axis logarithmic, with the values ``x`` written out as its only ticks."""
    axis.set_xscale("log", base=base)
    axis.set_xticks(x, [f"{value:,}" for value in x])
    axis.minorticks_off()
