"""What memories begin with before their chunks, and what is left of them afterwards."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Edges(NamedTuple):
    """Linear maps of arrays with any axes in front, for first states that are known in part.

    Attributes:
      begin: makes first states from what is given.
      finish: returns what is wanted of last states.
    """

    begin: Callable[[Any], Any] = lambda given: given
    finish: Callable[[Any], Any] = lambda state: state

    def first(self, given: Any, batch: tuple[int, ...]) -> Any:
        """The first states (*batch, ...), where an axis of 1 of what is given stands for all."""
        each = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape[len(batch) :])), given)
        return self.begin(each)

    def pull_begin(self, given: Any, d_state: Any) -> Any:
        """The cotangents of what is given, or of its shape, from those of first states."""
        return jax.linear_transpose(self.begin, given)(d_state)[0]

    def pull_finish(self, state: Any, d_end: Any) -> Any:
        """The cotangents of last states, or of their shape, from those of what is wanted."""
        return jax.linear_transpose(self.finish, state)(d_end)[0]
