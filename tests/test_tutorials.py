"""The notebooks of docs/tutorials run from their first cell to the last, and store no outputs."""

import json
from pathlib import Path

import jax
import matplotlib
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))


def cells(notebook):
    return [x for x in json.loads(notebook.read_text())["cells"] if x["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_runs(notebook, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("STEPS", "24")
    matplotlib.use("agg")
    names = {"__name__": "__main__"}
    with jax.numpy_rank_promotion("allow"):  # as where users run it
        for number, cell in enumerate(cells(notebook)):
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_stores_no_outputs(notebook):
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(notebook))
