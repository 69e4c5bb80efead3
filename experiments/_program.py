"""Runs programs from the command line: errors that a user can fix take one line."""

import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

EXPECTED = (ValueError, NotImplementedError, OSError, ImportError, FloatingPointError)
"""Errors that a user can fix; any other is a bug, and shows its traceback."""


def run(program: Callable[[], None], expected: tuple[type[Exception], ...] = EXPECTED) -> None:
    """Runs a program whose arguments are flags, and exits with 1 after an error.

    Args:
      program: the program.
      expected: the errors that take one line.
    """

    def main(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"expected only flags, got {' '.join(argv[1:])}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax logs every step it takes
        try:
            program()
        except Exception as e:
            lacks = _of_ml_collections(e)
            if _DEBUG.value or not (lacks or isinstance(e, expected)):
                raise
            told = f"the configuration lacks the key {_one_line(e)}" if lacks else e
            print(f"error: {told}", file=sys.stderr, flush=True)
            sys.exit(1)

    app.run(main, flags_parser=parse_flags)


def _of_ml_collections(error: Exception) -> bool:
    """Whether a configuration raised the error, for a key that it has not."""
    if not isinstance(error, (AttributeError, KeyError)):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals["__name__"].startswith("ml_collections")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; what a configuration's file raises takes one line too."""
    try:
        return app.parse_flags_with_usage(argv)
    except Exception as e:
        if "--debug" in argv:
            raise
        flags_given = " ".join(argv[1:])
        kind = "" if isinstance(e, (AttributeError, ValueError)) else f"{type(e).__name__}: "
        sys.exit(f"error: in the flags {flags_given}: {kind}{_one_line(e)}")


def _one_line(error: Any) -> str:
    """What an error says, or the one that it holds, as those of ml_collections do."""
    while isinstance(error, (AttributeError, KeyError)) and error.args:
        error = error.args[0]
    return " ".join(str(error).split())


def define_integers(name: str, default: Sequence[int] | None, help: str) -> None:
    """Defines a flag that takes integers of at least 1, such as ``--lengths=4096,65536``.

    Its value is a list of strings, or None.
    """

    def good(values: list[str] | None) -> bool:
        return all(value.isdecimal() and int(value) > 0 for value in values or ())

    flags.DEFINE_list(name, None if default is None else [*map(str, default)], help)
    flags.register_validator(name, good, "must be integers of at least 1, separated by commas")


class ConfigFlag:
    """The flag ``--config=FILE``, and ``--config.KEY=VALUE`` for each key."""

    def __init__(self, flag_values: flags.FlagValues = flags.FLAGS) -> None:
        self._values = flag_values
        options: dict[str, Any] = dict(lock_config=True, flag_values=flag_values)
        self._flag = config_flags.DEFINE_config_file("config", **options)
        flags.mark_flag_as_required("config", flag_values)

    @property
    def value(self) -> Any:
        """The configuration: what the file's ``get_config`` returns, also as a dict.

        Raises:
          ValueError: for anything else.
        """
        config = self._flag.value
        if isinstance(config, dict):
            config = ConfigDict(config)
        if not isinstance(config, ConfigDict):
            raise ValueError(
                "the configuration's file must have a function get_config that returns a "
                f"ConfigDict, such as memcache_jax.training.default_config(), got {config!r}"
            )
        return config.lock()

    def of_file(self) -> Any:
        """The configuration as its file returns it, before flags set keys."""
        file, *argument = config_flags.get_config_filename(self._values["config"]).split(":", 1)
        config = runpy.run_path(file)["get_config"](*argument)
        return ConfigDict(config) if isinstance(config, dict) else config
