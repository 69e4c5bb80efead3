"""The picture of what tokens read."""

from typing import Any

import numpy as np
import pytest

from experiments._gates_picture import effective, over_text, picture


def layer(block) -> dict[str, Any]:
    """Two segments of two tokens, and one of one, with one head that reads all states alike."""
    visible = np.array([[0, 0, 1], [0, 0, 1], [1, 0, 1], [1, 0, 1], [1, 1, 1]], np.float32)
    gates = (visible / visible.sum(axis=-1, keepdims=True))[:, None]
    states = [[0, 2], [2, 4]]
    return dict(name=f"layer {block}: SSD", states=states, begin=[0, 2, 4], gates=gates)


def test_gates_over_the_places_of_the_text():
    image = over_text(layer(0))
    nan = np.nan
    wanted = [
        [1, nan, nan, nan, nan],
        [1, 1, nan, nan, nan],
        [0.5, 0.5, 0.5, nan, nan],
        [0.5, 0.5, 0.5, 0.5, nan],
        [1 / 3] * 5,
    ]
    np.testing.assert_allclose(image, wanted, rtol=1e-6)


def test_states_that_are_read():
    assert effective(layer(0)["gates"]) == pytest.approx([1, 1, 2, 2, 3])
    # One state has nearly all the weight; a state without a gate is none.
    assert effective(np.array([[[0.999, 0.001, 0.0]]])) == pytest.approx([1.0079], abs=1e-3)


def test_picture():
    figure = picture(dict(layers=[layer(i) for i in range(9)]))
    *shown, last, _ = figure.axes
    assert [axis.get_title() for axis in shown] == ["layer 0", "layer 4", "layer 8"]
    read, *lines = last.lines
    assert read.get_ydata().tolist() == [1, 1, 2, 2, 3]
    assert [line.get_label() for line in lines] == ["layer 0", "layer 4", "layer 8"]
