"""The Python of the README and of docs/ runs as it stands; what the README points to exists."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import (
    AGGREGATIONS,
    REFERENCE,
    TWO_PLANS,
    assert_close,
    combine,
    make_inputs,
    run_all,
)

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


@pytest.mark.usefixtures("x64")
def test_write_your_own_memory():
    page = (ROOT / "docs/write_your_own_memory.md").read_text()
    code = "".join(block for _, block in BLOCK.findall(page))
    names = {}
    with jax.enable_x64(False):
        exec(compile(code, "write_your_own_memory.md", "exec"), names)
    memory = names["Erasing"]()
    inputs = make_inputs(memory, 19)
    options = dict(cases=combine(("grm", "ssc"), TWO_PLANS))
    wanted = run_all(inputs, memory, **options, options=REFERENCE)
    assert_close(run_all(inputs, memory, **options), wanted, 1e-12)
    outputs, tokens = [], {name: x for name, x in inputs.items() if name != "weights"}
    cache = mc.init_cache(
        *(2, 3, 4, 4),
        memory=memory,
        aggregation=AGGREGATIONS["ssc"],
        segmentation=mc.Logarithmic(4),
        max_segments=4,
        dtype=jnp.float64,
    )
    for begin, end in ((0, 7), (7, 19)):
        part = jax.tree.map(lambda x, b=begin, e=end: x[:, b:e], tokens)
        y, cache = jax.jit(mc.extend)(cache, **part)
        outputs.append(y)
    y = jnp.concatenate(outputs, axis=1)
    assert_close(y, wanted["ssc/logarithmic/independent"], 1e-10)
    ids = np.array([[0] * 5 + [1] * 14, [0] * 2 + [1] * 9 + [0] * 8])
    documents = dict(cases=combine(("grm",), TWO_PLANS[:1]))
    wanted = run_all(inputs, memory, **documents, options=REFERENCE, document_ids=ids)
    assert_close(run_all(inputs, memory, **documents, document_ids=ids), wanted, 1e-12)
    assert BLOCK.findall(page)[0][1].count("\n") < 60


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
