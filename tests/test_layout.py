"""Tests mirror the library: a file's tests are in the file of its name."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# What is tested of the whole project, not of a module.
_WHOLE = "docs docstrings layout packaging readme site tutorials"
WHOLE = {f"test_{name}.py" for name in _WHOLE.split()}
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))
MIRRORS = [file for file in FILES if file.parts[0] != "contracts" and file.as_posix() not in WHOLE]


def modules(file):
    """Where the module may be that a file of tests is for: ``test_x.py`` for x, _x or a folder."""
    room = "" if file.parts[0] in ("kernels", "experiments") else "memcache_jax"
    folder, name = TESTS.parent / room / file.parent, file.stem.removeprefix("test_")
    return [folder / f"{name}.py", folder / f"_{name}.py", folder / name / "__init__.py"]


@pytest.mark.parametrize("file", MIRRORS, ids=str)
def test_there_is_a_module_of_its_name(file):
    places = modules(file)
    names = [str(place.relative_to(TESTS.parent)) for place in places]
    assert any(place.exists() for place in places), (
        f"tests/{file} needs one of {names}: name it after the module that it tests, or put what "
        "holds for everything in tests/contracts/"
    )


def test_the_tests_of_the_whole_project_are_there():
    assert set(map(str, FILES)) >= WHOLE
