"""The Python of the README and of docs/ runs as it stands; what the pages point to exists."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from tests.cases import MEMORIES

ROOT = Path(__file__).parents[1]
FOLDER = "in a folder with "
BLOCK = re.compile(rf"^(?:<!-- {FOLDER}(\S+) -->\n)?```python\n(.*?)^```$", re.M | re.S)
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("streams", "training", "training_loop"))]


def blocks():
    """The Python blocks of the pages that stand alone: page, line, code, and what they need."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(2)) + 1
            yield pytest.param(page, line, match[2], match[1], id=f"{page}:{line}")


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line", "code", "needs"), list(blocks()))
def test_block(page, line, code, needs, request, monkeypatch, tmp_path):
    if needs == "runs/demo":
        monkeypatch.chdir(request.getfixturevalue("trained_run").parents[1])
    elif needs is not None:
        assert needs == "Qwen3.5-2B"
        (tmp_path / needs).symlink_to(ROOT / "tests/data/pretrained/qwen3_5_text")
        monkeypatch.chdir(tmp_path)
    # Blank lines first, so that a traceback has the page's line numbers.
    exec(compile("\n" * (line - 1) + code, page, "exec"), {"__name__": "__main__"})


def test_all_blocks_are_found():
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert len(BLOCK.findall(text)) == text.count("```python")


@pytest.mark.slow
def test_write_your_own_memory():
    page = (ROOT / "docs/write_your_own_memory.md").read_text()
    rule, *others = (block for _, block in BLOCK.findall(page))
    assert rule.count("\n") < 60
    exec(compile("".join([rule, *others]), "write_your_own_memory.md", "exec"), {})
    # And the shared tests take it, listed once.
    assert repr(MEMORIES["erasing"]) == "Erasing()"


def anchors(page):
    """The anchors of a page's titles, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page",
    sorted(
        [
            "README.md",
            "CONTRIBUTING.md",
            *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
        ]
    ),
)
def test_links_lead_to_what_exists(page):
    text = (ROOT / page).read_text()
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"
    for name in re.findall(r"\bconfigs/\w+\.py", text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"\bexperiments\.([a-z]\w+)", text):
        path = ROOT / "experiments" / module
        assert path.is_dir() or path.with_suffix(".py").exists(), module


def images():
    """The pages with pictures, and the alternative texts of those."""
    pages = (path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb"))
    for path in [ROOT / "README.md", *sorted(pages)]:
        text = path.read_text().replace("\\n", " ")
        if found := re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", text):
            yield pytest.param(path.parent, found, id=str(path.relative_to(ROOT)))


@pytest.mark.parametrize(("folder", "found"), list(images()))
def test_pictures_say_what_they_show(folder, found):
    for alternative, path in found:
        assert len(alternative.split()) >= 5, path
        assert "://" in path or (folder / path).exists(), path


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 150


def test_pages_name_every_program_and_target():
    programs = {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")}
    programs |= {path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py")}
    listed = re.findall(r"^\| `experiments\.(\w+)`", (ROOT / "docs/programs.md").read_text(), re.M)
    assert sorted(programs) == sorted(listed)
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    pages = ["README.md", "CONTRIBUTING.md", *map(str, (ROOT / "docs").glob("*.md"))]
    text = "".join((ROOT / page).read_text() for page in pages)
    assert set(targets.split()) - set(re.findall(r"make ([\w-]+)", text)) == {"clean"}


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs/api").glob("*.md")), ids=lambda page: page.stem
)
def test_the_reference_has_everything_public(page):
    own = {"core": "memcache_jax", "recurrent": "memcache_jax.nn.recurrent"}
    own["http"] = "memcache_jax.serving.http"
    module = importlib.import_module(own.get(page.stem, f"memcache_jax.{page.stem}"))
    listed = {name.rsplit(".", 1)[1] for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}
    assert "\n\n*On GitHub this page only lists names: `make docs` renders" in page.read_text()
    names = [name for name in getattr(module, "__all__", ()) if name != "FAMILIES"]
    assert {name for name in names if not inspect.ismodule(getattr(module, name))} <= listed
