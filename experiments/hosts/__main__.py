"""Runs third-party models and trainers with our layers in them, and prints a table.

    make hosts
    .venv-hosts/bin/python -m experiments.hosts --hosts=gemma,maxtext

Hardware: two CPU cores. Time: 6 minutes, and 2 to install. Needs Python 3.12.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import textwrap

from absl import flags

from experiments import _program

HOSTS = ("minigpt", "gemma", "maxtext", "tunix")
_NAMES = flags.DEFINE_list("hosts", list(HOSTS), "which hosts")
_DEVICES = flags.DEFINE_integer("devices", 1, "CPU devices; with several, hosts make a mesh")
_HERE = flags.DEFINE_string("here", None, "one host, in this process; prints its rows as JSON")
_MARK = "experiments.hosts: "


def main() -> None:
    """Runs each host in a process of its own, since they set up JAX as they like."""
    if _HERE.value is not None:
        _run_here(_HERE.value)
        return
    if unknown := set(_NAMES.value) - set(HOSTS):
        raise ValueError(f"the hosts are {', '.join(HOSTS)}, got {', '.join(unknown)}")
    rows = [row for host in _NAMES.value for row in _run(host)]
    print(table(rows))
    if any(row["result"].startswith("failed") for row in rows):
        sys.exit(1)


def table(rows: list[dict]) -> str:
    """The rows in columns."""
    head = f"{'host':<25} {'version':<34} {'lines':>5}  result"
    lines = [head, "-" * 100]
    for row in rows:
        first, *rest = textwrap.wrap(row["result"], 90) or [""]
        lines.append(f"{row['host']:<25} {row['version']:<34} {row['lines']:>5}  {first}")
        lines += [" " * 67 + line for line in rest]
    return "\n".join(lines)


def _run(host: str) -> list[dict]:
    print(f"{host} ...", flush=True)
    command = [sys.executable, "-m", "experiments.hosts", f"--here={host}"]
    command += [f"--devices={_DEVICES.value}"]
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    environment["JAX_NUM_CPU_DEVICES"] = str(_DEVICES.value)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if found:
        return json.loads(found[-1].removeprefix(_MARK))
    print(done.stderr[-4000:], file=sys.stderr)
    status = f"status {done.returncode}"
    errors = [line for line in done.stderr.splitlines() if "rror: " in line]
    reason = errors[-1] if errors else status
    return [dict(host=host, version="", lines=0, result=f"failed: {reason[:300]}")]


def _run_here(host: str) -> None:
    module = importlib.import_module(f"experiments.hosts.{host}")
    rows = [dataclasses.asdict(row) for row in module.run(_DEVICES.value)]
    print(_MARK + json.dumps(rows), flush=True)


if __name__ == "__main__":
    _program.run(main)
