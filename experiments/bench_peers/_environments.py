"""Environments of other libraries, made where they are first needed."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_MADE = "made-from"


class NoEnvironmentError(RuntimeError):
    """An environment that cannot be made here."""


def environment(name: str, folder: Path, oldest: str = "3.11", newest: str = "3.99") -> str:
    """Returns the interpreter of an environment with the packages of its requirements.

    Args:
      name: of the file ``requirements-NAME.txt``.
      folder: where environments are made; one of the same requirements is used again.
      oldest: the first version of Python that all of the packages take.
      newest: the last.

    Raises:
      NoEnvironmentError: if there is no such Python, the packages cannot be installed, or the place
        is taken.
    """
    file = _HERE / f"requirements-{name}.txt"
    own = (folder / name).absolute()
    made, python = own / _MADE, str(own / "bin" / "python")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if made.exists() and made.read_text() == digest:
        return python
    if own.exists() and not (own / "pyvenv.cfg").exists():
        raise NoEnvironmentError(f"{own} is there already, and no environment of Python")
    print(f"Installing {', '.join(pins(name))} into {own} ...", file=sys.stderr, flush=True)
    _run([interpreter(oldest, newest), "-m", "venv", "--clear", str(own)])
    quiet = ["--quiet", "--disable-pip-version-check"]
    _run([python, "-m", "pip", "install", *quiet, "-r", str(file)])
    made.write_text(digest)
    return python


def pins(name: str) -> dict[str, str]:
    """The versions that ``requirements-NAME.txt`` pins."""
    lines = (_HERE / f"requirements-{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def interpreter(oldest: str, newest: str) -> str:
    """Returns a Python of these versions: this one, or one of the path.

    Raises:
      NoEnvironmentError: if there is none.
    """
    names = [f"python3.{minor}" for minor in range(_minor(oldest), min(_minor(newest), 20) + 1)]
    for name in (sys.executable, *names, *map(str, _of_pyenv())):
        try:
            told = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
        except OSError:
            continue
        version = re.match(r"Python 3\.(\d+)", told)  # a shim may tell that it has no such Python
        if version and _minor(oldest) <= int(version[1]) <= _minor(newest):
            return name
    raise NoEnvironmentError(f"there is no Python from {oldest} to {newest}")


def _minor(version: str) -> int:
    return int(version.removeprefix("3."))


def _of_pyenv() -> list[Path]:
    return sorted(Path.home().glob(".pyenv/versions/3.*/bin/python"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise NoEnvironmentError(errors[0][:200] if errors else f"status {done.returncode}")
