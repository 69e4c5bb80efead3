"""Maps of cached runs, which compose: a bank holds them after the states' matrices.

A run of an affine memory maps a matrix M to A M + B, where B is the state that the run leaves from
zero. So two runs in succession leave the state A2 B1 + B2, and their map is A2 A1. A diagonal A is
held as a matrix of one column.
"""

import functools
from typing import Any

import jax

from memcache_jax.engine.finite import composed
from memcache_jax.memories import Memory
from memcache_jax.memories.base import Run


def check_keeps_maps(memory: Memory, policy: Any) -> None:
    """Raises ValueError for a memory whose runs do not follow from matrices and their maps."""
    if memory.merges and not memory.weight_shapes(2, 2):
        state, transition = _shapes(memory, (2, 2), "float32")
        matrices = jax.eval_shape(memory.matrices, state)
        whole = jax.tree.leaves(state) == jax.tree.leaves(matrices)
        if whole and all(x.ndim in (1, 2) for x in jax.tree.leaves(transition)):
            return
    raise ValueError(
        f"policy={policy!r} composes runs: with independent starts it needs a memory whose state "
        "is a matrix that starts at zero and whose runs map it affinely, such as GatedDeltaNet, "
        f"got {memory}; policy='merge_by_age' takes the mean of states"
    )


def map_shapes(config: Any, heads: int, *sizes: int, dtype: Any) -> tuple:
    """The shapes (h, in, out) of the map that is kept beside one state, for sizes (k, v)."""
    if not config.keeps_maps:
        return ()
    maps = jax.tree.leaves(_shapes(config.memory, sizes, dtype).transition)
    return tuple(jax.ShapeDtypeStruct((heads, len(x), *(x.shape[1:] or (1,))), dtype) for x in maps)


def maps_of(transition: Any) -> tuple:
    """The maps of runs (b, h, 1, ...), as a bank holds them."""
    return tuple(x if x.ndim == 5 else x[..., None] for x in jax.tree.leaves(transition))


def compose(memory: Memory, first: tuple, then: tuple) -> tuple:
    """Two successive runs as one: matrices (b, h, 1, in, out), as a bank holds them."""
    shapes, structure = jax.tree.flatten(_shapes(memory, first[0].shape[-2:], first[0].dtype))

    def run(held: tuple) -> Run:
        pairs = zip(held, shapes, strict=True)
        leaves = [x.reshape(*x.shape[:3], *like.shape) for x, like in pairs]
        return jax.tree.unflatten(structure, leaves)

    of_each = functools.partial(composed, memory)
    for _ in range(3):
        of_each = jax.vmap(of_each)
    state, transition = of_each(run(first), run(then))
    return *memory.matrices(state), *maps_of(transition)


def _shapes(memory: Memory, sizes: tuple[int, ...], dtype: Any) -> Run:
    """The state and the transition of a run, for sizes (k, v)."""
    key_dim, value_dim = sizes
    return jax.eval_shape(
        lambda: Run(memory.init({}, key_dim, value_dim, dtype), memory.identity(key_dim, dtype))
    )
