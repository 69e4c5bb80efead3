"""The style of pictures: lines differ without their color."""

import itertools

from memcache_jax.training.pictures import COLORS, MARKERS, look, new_figure, tick_values


def lightness(color):
    """Relative luminance to the power of 1/3, from 0 to 1."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    weights = (0.2126, 0.7152, 0.0722)
    return sum(w * part**2.2 for w, part in zip(weights, parts, strict=True)) ** (1 / 3)


def test_lines_differ_in_grey():
    _, ((axis,),) = new_figure(1)
    for _ in COLORS:
        axis.plot([0, 1], [0, 1])
    shapes = {(line.get_marker(), str(line.get_linestyle())) for line in axis.lines}
    assert {marker for marker, _ in shapes} == set(MARKERS)
    assert [line.get_color() for line in axis.lines] == list(COLORS)
    assert len({str(look(number)["linestyle"]) for number in range(len(COLORS))}) == len(COLORS)
    first = [lightness(color) for color in COLORS[:4]]
    assert all(later - earlier > 0.07 for earlier, later in itertools.pairwise(first))
    assert max(map(lightness, COLORS)) < 0.8  # none fades into white


def test_figures_have_the_axes_and_size_asked_for():
    figure, axes = new_figure(2, 3, size=(4.0, 1.0))
    assert axes.shape == (3, 2)
    assert figure.get_size_inches().tolist() == [8.0, 3.0]


def test_ticks_are_the_values():
    _, ((axis,),) = new_figure(1)
    axis.plot([256, 4096], [1, 2])
    tick_values(axis, [256, 4096])
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["256", "4,096"]
    assert not axis.xaxis.get_minorticklocs().size
