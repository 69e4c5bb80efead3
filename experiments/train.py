"""Trains a language model: ``python -m experiments.train --config=FILE --workdir=FOLDER``.

Any key of the configuration can be set, as in ``--config.data.files=PATH --config.steps=2000``;
``memcache_jax.training.default_config`` documents all keys.
"""

import logging
import sys
from collections.abc import Sequence

from absl import flags
from absl import logging as absl_logging

from experiments._next import suggestions
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
        lines = suggestions(config, workdir, results["step"], sys.argv[1:])
        print(_summary(results, workdir, lines), flush=True)


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


def _summary(results: dict, workdir: str, lines: Sequence[str]) -> str:
    """Returns the results, and commands to try next."""
    sample = ["Sample:", results["sample"], ""] if "sample" in results else []
    return "\n".join(
        [
            "",
            *sample,
            f"parameters           {results['parameters']:,}",
            f"tokens trained on    {results['tokens']:,}",
            f"held-out bits/byte   {results['heldout_bits_per_byte']:.4f}",
            f"held-out perplexity  {results['heldout_perplexity']:.3f} per token",
            f"curve, sample, model {workdir}/loss.png, {workdir}/sample.txt, {workdir}/params",
            "",
            "Try next:",
            *(f"  {line}" for line in lines),
        ]
    )


if __name__ == "__main__":
    run(program, (*EXPECTED, CheckpointError))
