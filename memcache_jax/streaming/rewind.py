"""Rewinding caches of all kinds by tokens: positions, and calls."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax import _checks
from memcache_jax._eager import compiled
from memcache_jax._typing import Array, Int
from memcache_jax.sharding.division import Division


def taken_back(
    position: Int[Array, "b"], rewindable: Int[Array, "b"], tokens: Int[Array, "b"]
) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
    """Positions without the last tokens, and by how many more each row can go back.

    Rows that cannot go back that far move to the largest position, where outputs are NaN.
    """
    lost = (tokens < 0) | (tokens > rewindable)
    position = jnp.where(lost, _checks.LARGEST, position - tokens).astype(position.dtype)
    return position, jnp.where(lost, 0, rewindable - tokens).astype(rewindable.dtype)


def more_rewindable(rewindable: Array | None, taken: Any, most: int) -> Array | None:
    """By how many tokens rows can go back after ``taken`` more; None where they cannot at all."""
    if rewindable is None:
        return None
    return jnp.minimum(rewindable + jnp.minimum(taken, most), most).astype(rewindable.dtype)


def taken_back_from(cache: Any, tokens: jax.typing.ArrayLike, batch: int) -> Any:
    """Checks the tokens and takes them back, wherever the cache's arrays lie on a mesh."""
    taken = _checks.check_rewind(tokens, getattr(cache, "rewindable", None), batch)
    return where_it_lies(_rewound, cache, taken)[0]


def where_it_lies(
    function: Callable[..., tuple], cache: Any, *of_rows: Array, others: int = 0
) -> tuple:
    """Calls a function of a cache and arrays (b,), wherever the cache's arrays lie on a mesh.

    The function returns a cache of the same shapes, and ``others`` more arrays (b,).
    """
    letters = cache.letters()
    pairs: list = []
    jax.tree.map(
        lambda axes, tree: pairs.extend((x, axes) for x in jax.tree.leaves(tree)), letters, cache
    )
    division = Division.of(*pairs)
    if division is None:
        return compiled(function, cache, *of_rows)
    given, returned = (letters, *["b"] * len(of_rows)), (letters, *["b"] * others)
    return division.run(function, (cache, *of_rows), given, returned)


def _rewound(cache: Any, tokens: Int[Array, "b"]) -> tuple[Any]:
    return (cache.rewound(tokens),)
