"""The last inputs that a layer keeps of a stream, and those before them, to go back by tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Int
from memcache_jax.sharding.division import Division
from memcache_jax.streaming.borders import num_ends
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

    back = ago[None, 1:]
    places = (position + counts)[:, None] - back, counts[:, None] >= back
    past = _kept(past, earlier, *places, size, tails, position, first, axes)
    return (results, jax.tree.map(lambda x: x[0], after)), past


def tails_at_ends(
    call: Callable[[Array], tuple[Any, Any]],
    ends: Any,
    size: int,
    every: int,
    tails: Any,
    position: Int[Array, "b"],
    counts: Int[Array, "b"],
    most: int,
    first: Any,
    axes: str = "b . h",
) -> Any:
    """The ring of the tails at multiples of ``every`` tokens, after a layer's next ones.

    ``ends`` are the arrays of a ``Ring``, or None to keep none; all else is as in ``next_tails``.
    """
    if ends is None:
        return None
    each = np.arange(most // every + 1)[:, None]
    number = position[None] // every + each
    taken, counts = (number + 1) * every - position[None], counts[None]
    there = taken <= counts
    there &= each >= there.sum(axis=0, keepdims=True) - size  # the last, one for each place
    after = jax.vmap(lambda count: call(count)[1])(jnp.minimum(taken, counts))
    rows = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), after)
    return _kept(ends, rows, number.T, there.T, size, tails, position, first, axes)


def _kept(
    past: Any,
    rows: Any,
    places: Int[Array, "b n"],
    there: Bool[Array, "b n"],
    size: int,
    tails: Any,
    position: Int[Array, "b"],
    first: Any,
    axes: str,
) -> Any:
    """The arrays of a ring with rows (b, n, ...) put at these places, where their tails lie."""

    def put(past: Any, rows: Any, places: Array, there: Array, first: Any) -> Any:
        return Ring(size, rows, first).put(past, rows, places, there)

    args = past, rows, places, there, first
    division = Division.of(*((x, axes) for x in jax.tree.leaves(tails)), (position, "b"))
    if division is None:
        return put(*args)
    of_past = f"b . . {axes[2:]}" if first is None else f". b . . {axes[2:]}"
    letters = of_past, f"b . {axes[2:]}", "b", "b", None if first is None else ""
    return division.run(put, args, letters, of_past)


def earlier_tails(
    tails: Any, past: Any, size: int, position: Int[Array, "b"], then: Int[Array, "b"], first: Any
) -> Any:
    """The tails that rows at ``position`` had ``then``."""
    return where_rows(then < position, Ring(size, tails, first).at(past, then), tails)


def tails_at(
    tails: Any,
    ends: Any,
    config: Any,
    position: Int[Array, "b"],
    rows: Bool[Array, "b"],
    first: Any,
) -> Any:
    """The tails, in the marked rows those that they had at ``position``, a segment's begin."""
    if ends is None:  # there are none
        return tails
    block = position // config.segmentation.size
    kept = Ring(num_ends(config), tails, first).at(ends, block - 1)
    none = jax.tree.map(jnp.zeros_like, tails)
    return where_rows(rows, where_rows(block > 0, kept, none), tails)
