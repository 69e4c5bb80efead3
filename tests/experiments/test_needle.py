"""Needles: where they are, how long their haystacks are, and models that find them or not."""

from typing import Any

import jax
import numpy as np
import pytest

from experiments import needle as program
from experiments._needles import NOISE, essay, found, lite, needle
from experiments._study import Study


@pytest.mark.parametrize("task", [1, 2, 3])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_prompt_has_its_length_and_its_needle_at_its_depth(task, depth):
    made = needle(task, 3000, depth, count=len, random=np.random.RandomState(0), prose=essay())
    whole = f"{made.prompt} {made.value}"
    assert 3000 - 30 < len(whole) <= 3000
    assert made.prompt.count(made.value) == 1
    assert made.prompt.endswith("mentioned in the provided text is")
    at = made.prompt.index("One of the special") / len(made.prompt)
    assert abs(at - depth) < 0.2
    assert (NOISE.split(".")[1] in made.prompt) == (task == 1)
    assert len(made.value) == (36 if task == 3 else 7)
    assert found([made], [f" {made.value.upper()}."]) == 1.0
    assert found([made, made], ["nothing", made.value]) == 0.5


def test_needles_that_cannot_be():
    options: dict[str, Any] = dict(
        count=len, random=np.random.RandomState(0), prose=["a", "b.", "c"]
    )
    for arguments, match in (
        ((4, 900, 0.5), "task must be"),
        ((1, 900, 2.0), "depth must be"),
        ((1, 50, 0.5), "does not fit"),
    ):
        with pytest.raises(ValueError, match=match):
            needle(*arguments, **options)
    with pytest.raises(ValueError, match="length must be above 12"):
        lite(12)


@pytest.mark.parametrize("depth", [None, 0.0, 1.0])
def test_light_needles(depth):
    rows = jax.vmap(lite(40, depth))(jax.random.split(jax.random.key(0), 50))
    tokens, places, answers = map(np.asarray, rows)
    for row, place, answer in zip(tokens, places, answers, strict=True):
        text = "".join(map(chr, row))
        digits = "".join(map(chr, answer))
        assert text.count(digits) == 2
        assert text.endswith(digits)
        np.testing.assert_array_equal(row[place + 1], answer)
        if depth is not None:
            assert text.index("#") == (0 if depth == 0 else 28)


@pytest.mark.slow
def test_the_programs(tmp_path, trained_run):
    config = program.needle_config()
    config.models, config.lengths, config.depths = ("ssd", "ssd_grm"), (32, 48), 2
    config.train, config.steps, config.batch_size, config.test_examples = (16, 24), 2, 2, 3
    config.width, config.head_dim, config.segment, config.samples = 16, 4, 4, 2
    study = Study(tmp_path / "light", config)
    program.program(config, study)
    study.close()
    assert (tmp_path / "light" / "table.md").read_text().count("ssd") == 2

    config.trained, config.tasks, config.lengths = (str(trained_run),), (1, 3), (500,)
    study = Study(tmp_path / "trained", config)
    program.program(config, study)
    study.close()
    assert (tmp_path / "trained" / "table.md").read_text().count("task 3") == 1
    assert (tmp_path / "trained" / "needle.png").stat().st_size > 5000
