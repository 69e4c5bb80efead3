"""The README's Python runs as it stands, and what the README points to exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^(<!-- in a folder with runs/demo -->\n)?```python\n(.*?)^```$", re.M | re.S)


def blocks(*, with_run):
    """The Python blocks, under the number of their line."""
    for match in BLOCK.finditer(README):
        if bool(match[1]) == with_run:
            line = README.count("\n", 0, match.start(2)) + 1
            yield pytest.param(match[2], line, id=f"line {line}")


def run(code, line):
    # Blank lines first, so that a traceback has the README's line numbers.
    exec(compile("\n" * (line - 1) + code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("code", "line"), list(blocks(with_run=False)))
def test_block(code, line):
    run(code, line)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # as the README says
@pytest.mark.parametrize(("code", "line"), list(blocks(with_run=True)))
def test_block_that_needs_a_run(code, line, trained_run, monkeypatch):
    monkeypatch.chdir(trained_run.parents[1])
    run(code, line)


def test_all_blocks_are_found():
    assert len(BLOCK.findall(README)) == README.count("```python")


def test_what_it_points_to_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    files = re.findall(r"\b(?:configs/\w+\.py|docs/[\w./]+)", README)
    modules = re.findall(r"experiments\.\w+", README)
    modules = [module.replace(".", "/") + ".py" for module in modules]
    assert links
    assert modules
    missing = {name for name in [*links, *files, *modules] if not (ROOT / name).exists()}
    assert not missing
