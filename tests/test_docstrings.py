"""Every example in a docstring of the library runs and gives what it says."""

import ast
import doctest
import importlib
import os
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "memcache_jax"


def examples():
    """(module, name of the class or function, docstring) wherever a docstring has a prompt."""
    # Read from the source: doctest's own search passes over decorated functions.
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix != ".py":
                continue
            module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    docstring = ast.get_docstring(node)
                    if docstring and ">>>" in docstring:
                        name = "" if isinstance(node, ast.Module) else node.name
                        label = f"{module}.{name}".removesuffix(".")
                        yield pytest.param(module, docstring, id=label)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "docstring"), list(examples()))
def test_example(module, docstring):
    names = dict(vars(importlib.import_module(module.removesuffix(".__init__"))))
    test = doctest.DocTestParser().get_doctest(docstring, names, module, None, 0)
    report = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert failed == 0, "".join(report)


def test_there_are_examples():
    found = {example.id for example in examples()}
    assert {
        "memcache_jax.caching.memory_caching",
        "memcache_jax.generation.generate.generate",
    } <= found
