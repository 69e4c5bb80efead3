"""The last inputs that a layer keeps of a stream, and those before them, to go back by tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Int
from memcache_jax.sharding.division import Division
from memcache_jax.streaming.ring import Ring, where_rows


def next_tails(
    call: Callable[[Array], tuple[Any, Any]],
    past: Any,
    size: int,
    tails: Any,
    position: Int[Array, "b"],
    counts: Int[Array, "b"],
    most: int,
    first: Any,
    axes: str = "b . h",
) -> tuple[tuple[Any, Any], Any]:
    """A layer's next tails, and the ring of those before.

    Args:
      call: given how many of each row's tokens count, returns results that do not depend on it,
        and the tails after them.
      past: arrays of a ``Ring`` of tails; None to keep none.
      size: of the ring.
      tails: trees of arrays (b, ...) before the tokens.
      position: tokens before them.
      counts: how many count.
      most: the most that may.
      first: the number of the layer in a stack.
      axes: the letters of the axes of tails, as ``sharding.Division`` has them.

    Returns:
      What ``call`` returns of ``counts``, and the next ``past``.
    """
    if past is None:
        return call(counts), None
    ago = np.arange(1 + min(size, most))
    each = jnp.maximum(counts[None] - ago[:, None], 0)
    results, after = jax.vmap(call, out_axes=(None, 0))(each)
    earlier = jax.tree.map(lambda x: jnp.moveaxis(x[1:], 0, 1), after)

    def keep(past: Any, earlier: Any, position: Array, counts: Array, first: Any) -> Any:
        back = ago[None, 1:]
        places = (position + counts)[:, None] - back, counts[:, None] >= back
        return Ring(size, earlier, first).put(past, earlier, *places)

    args = past, earlier, position, counts, first
    division = Division.of(*((x, axes) for x in jax.tree.leaves(tails)), (position, "b"))
    if division is None:
        past = keep(*args)
    else:
        of_past = f"b . . {axes[2:]}" if first is None else f". b . . {axes[2:]}"
        letters = of_past, f"b . {axes[2:]}", "b", "b", None if first is None else ""
        past = division.run(keep, args, letters, of_past)
    return (results, jax.tree.map(lambda x: x[0], after)), past


def earlier_tails(
    tails: Any, past: Any, size: int, position: Int[Array, "b"], then: Int[Array, "b"], first: Any
) -> Any:
    """The tails that rows at ``position`` had ``then``."""
    return where_rows(then < position, Ring(size, tails, first).at(past, then), tails)
