"""The list of programs."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import main, programs

FOLDER = Path(__file__).parents[2] / "experiments"


def test_every_program_has_a_line_of_its_own(capsys):
    main()
    shown = capsys.readouterr().out.splitlines()
    names = {path.stem for path in FOLDER.glob("[!_]*.py")}
    names |= {path.parent.name for path in FOLDER.glob("*/__main__.py")}
    assert {line.split()[0] for line in shown[2:]} == names
    for name, summary in programs().items():
        assert summary, name
        assert len(summary) <= 90, name


@pytest.mark.slow
def test_the_command():
    command = [sys.executable, "-m", "experiments"]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    assert "experiments.NAME" in done.stdout
