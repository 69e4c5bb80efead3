"""What to try after a run of ``experiments.train``."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def suggestions(config: Any, workdir: str, steps: int, argv: Sequence[str]) -> list[str]:
    """Returns commands to try next, each with what it is for.

    Args:
      config: the run's configuration.
      workdir: its folder.
      steps: the steps it has trained.
      argv: the arguments of its command, which most commands repeat.
    """
    here = os.path.relpath(sys.executable)
    python = shlex.quote(sys.executable if here.startswith("..") else here)
    folder = shlex.quote(workdir)

    def again(flags: Mapping[str, object]) -> str:
        return f"{python} -m experiments.train {shlex.join(changed(argv, flags))}"

    longer = again({"config.resume": True, "config.steps": 2 * steps})
    if config.pretrained is None:
        lines = {
            "another prompt": f"{python} -m experiments.generate --workdir={folder} "
            "--prompt='class Stack:'",
            "train longer": longer,
            "your own files": again({"config.data.files": "FOLDER", "workdir": "runs/mine"}),
            "attention": f"{python} -m experiments.train --config=configs/transformer_demo.py "
            "--workdir=runs/transformer_demo",
        }
    else:
        other = "caches" if config.tune == "lora" else "lora"
        beside = f"{workdir.rstrip('/')}_{other}"
        lines = {
            "a prompt": f"{python} -m experiments.generate --workdir={folder} --prompt=TEXT",
            "what it reads": f"{python} -m experiments.inspect --workdir={folder} --text=FILE",
            "train longer": longer,
            f"tune {other}": again({"config.tune": other, "workdir": beside}),
        }
    width = max(map(len, lines))
    return [f"{name:{width}}  {command}" for name, command in lines.items()]


def changed(argv: Sequence[str], flags: Mapping[str, object]) -> list[str]:
    """Returns the arguments of a command with flags replaced or added."""
    kept, dropped = [], False
    for argument in argv:
        name, equals, _ = argument.lstrip("-").partition("=")
        is_flag = argument.startswith("-")
        # The value of a flag without "=" is the next argument, unless that is a flag.
        if not (name in flags if is_flag else dropped):
            kept.append(argument)
        dropped = is_flag and name in flags and not equals
    return [*kept, *(f"--{name}={value}" for name, value in flags.items())]
