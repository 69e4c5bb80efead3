"""Runs programs from the command line."""

import sys
from collections.abc import Callable, Sequence

from absl import app


def run(program: Callable[[], None]) -> None:
    """Runs a program whose arguments are flags; shows errors that a user can fix in one line."""

    def main(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"expected only flags, got {' '.join(argv[1:])}")
        try:
            program()
        except (ValueError, OSError, ImportError) as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(1)

    app.run(main)
