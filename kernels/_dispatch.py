"""Choice among the implementations of an operation."""

from collections.abc import Callable, Mapping
from typing import Any


def choose(
    name: str, implementations: Mapping[str, Callable[..., Any]], choice: str | None
) -> Callable[..., Any]:
    """Returns the implementation of that name, ``"xla"`` for None.

    Raises:
      ValueError: for an unknown name.
    """
    choice = choice or "xla"
    if choice not in implementations:
        raise ValueError(
            f"{name} has the implementations {sorted(implementations)}, got {choice!r}"
        )
    return implementations[choice]
