"""The Python of the README and of docs/ runs as it stands; what the README points to exists."""

import re
from pathlib import Path

import pytest

from tests.cases import MEMORIES

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


@pytest.mark.slow
@pytest.mark.parametrize(("code", "line"), list(blocks(with_run=False)))
def test_block(code, line):
    run(code, line)


@pytest.mark.slow
@pytest.mark.parametrize(("code", "line"), list(blocks(with_run=True)))
def test_block_that_needs_a_run(code, line, trained_run, monkeypatch):
    monkeypatch.chdir(trained_run.parents[1])
    run(code, line)


def test_all_blocks_are_found():
    assert len(BLOCK.findall(README)) == README.count("```python")


@pytest.mark.slow
def test_write_your_own_memory():
    page = (ROOT / "docs/write_your_own_memory.md").read_text()
    rule, *others = (block for _, block in BLOCK.findall(page))
    assert rule.count("\n") < 60
    exec(compile("".join([rule, *others]), "write_your_own_memory.md", "exec"), {})
    # And the shared tests take it, listed once.
    assert repr(MEMORIES["erasing"]) == "Erasing()"


def test_what_it_points_to_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    files = re.findall(r"\b(?:configs/\w+\.py|docs/[\w./]+)", README)
    modules = re.findall(r"experiments\.\w+", README)
    modules = [module.replace(".", "/") + ".py" for module in modules]
    assert links
    assert modules
    missing = {name for name in [*links, *files, *modules] if not (ROOT / name).exists()}
    assert not missing


def test_it_names_every_program_and_target():
    programs = {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")}
    assert programs == set(re.findall(r"experiments\.(\w+)", README))
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    pages = README + (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "docs/pods.md").read_text()
    named = set(re.findall(r"make ([\w-]+)", pages))
    assert set(targets.split()) - named == {"clean"}
