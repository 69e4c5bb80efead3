"""A module apart from its arrays, as compiled programs take it at each call."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """What a module is without its arrays: a static argument, one object for all equal modules.

    ``jit`` hashes static arguments at each call. A graph's hash takes milliseconds, as long as a
    token of a small model; that of an object takes nothing.
    """

    graph: Any
    structure: Any

    def merge(self, arrays: tuple) -> Any:
        """The module with these arrays."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, arrays))


def apart(module: nnx.Module) -> tuple[Frame, tuple]:
    """Splits a module into its frame and its arrays."""
    graph, state = nnx.split(module)
    arrays, structure = jax.tree.flatten(state)
    return _frame(graph, structure), tuple(arrays)


@functools.cache
def _frame(graph: Any, structure: Any) -> Frame:
    return Frame(graph, structure)
