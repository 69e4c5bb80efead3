"""Trains a language model: ``python -m experiments.train --config=FILE --workdir=FOLDER``.

Any key of the configuration can be set, as in ``--config.data.files=PATH --config.steps=2000``;
``memcache_jax.training.default_config`` documents all keys.
"""

import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from absl import flags
from absl import logging as absl_logging

from experiments._program import EXPECTED, ConfigFlag, run
from memcache_jax.training import CheckpointError, StoppedError, initialize, train
from memcache_jax.training.distributed import is_main_process

_CONFIG = ConfigFlag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder; created if it does not exist.", required=True
)


def program() -> None:
    """Trains, then prints the results and suggestions for what to try next."""
    _log_to_stdout()
    config, workdir = _CONFIG.value, _WORKDIR.value
    try:
        initialize()
        results = train(config, workdir)
    except StoppedError as e:
        print(f"\n{e}", flush=True)
        sys.exit(128 + e.signal_number)
    if is_main_process():
        print(_summary(results, workdir, sys.argv[1:]), flush=True)


def _log_to_stdout() -> None:
    """Shows this library's messages as plain lines, and hides Orbax's."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("memcache_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Orbax logs every step it takes, and pages about errors that it also raises.
    absl_logging.set_verbosity(absl_logging.FATAL)


def _summary(results: dict, workdir: str, argv: Sequence[str]) -> str:
    """Returns the results, and commands to try next."""

    def again(flags: Mapping[str, object]) -> str:
        """Returns the run's own command with changed flags."""
        kept, dropped = [], False
        for argument in argv:
            name, equals, _ = argument.lstrip("-").partition("=")
            is_flag = argument.startswith("-")
            # The value of a flag without "=" is the next argument, unless that is a flag.
            if not (name in flags if is_flag else dropped):
                kept.append(argument)
            dropped = is_flag and name in flags and not equals
        new = [f"--{name}={value}" for name, value in flags.items()]
        return f"{python} -m experiments.train {shlex.join([*kept, *new])}"

    here = os.path.relpath(sys.executable)
    python = shlex.quote(sys.executable if here.startswith("..") else here)

    longer = {"config.resume": True, "config.steps": 2 * results["step"]}
    own = {"config.data.files": "FOLDER", "workdir": "runs/mine"}
    lines = [""]
    if "sample" in results:
        lines += ["Sample:", results["sample"], ""]
    lines += [
        f"parameters           {results['parameters']:,}",
        f"tokens trained on    {results['tokens']:,}",
        f"held-out bits/byte   {results['heldout_bits_per_byte']:.4f}",
        f"held-out perplexity  {results['heldout_perplexity']:.3f} per token",
        f"curve, sample, model {workdir}/loss.png, {workdir}/sample.txt, {workdir}/params",
        "",
        "Try next:",
        f"  another prompt  {python} -m experiments.generate --workdir={shlex.quote(workdir)} "
        "--prompt='class Stack:'",
        f"  train longer    {again(longer)}",
        f"  your own files  {again(own)}",
        f"  attention       {python} -m experiments.train --config=configs/transformer_demo.py "
        "--workdir=runs/transformer_demo",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(program, (*EXPECTED, CheckpointError))
