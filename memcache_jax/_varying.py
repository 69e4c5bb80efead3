"""Arrays within a host's ``shard_map`` that checks over which of its axes each value varies.

There a scan's carry, and a cotangent of ours, must vary as their inputs do. What every device has
alike, such as parameters and zeros, is therefore marked first.
"""

from typing import Any

import jax


def alike(tree: Any) -> Any:
    """Marks all arrays of a tree as varying over the axes over which any of them does."""
    return vary(tree, varying(tree))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Marks arrays as varying over these axes."""

    def mark(x: Any) -> Any:
        missing = axes - varying(x)
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(mark, tree) if axes else tree


def varying(tree: Any) -> frozenset[str]:
    """The axes over which any array of a tree varies; none outside of a ``shard_map``."""
    types = map(jax.typeof, jax.tree.leaves(tree))
    return frozenset().union(*(of.manual_axis_type.varying for of in types))
