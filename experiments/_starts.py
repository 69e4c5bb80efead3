"""How memories write whose segments go on from each other: chunk after chunk, and all at once."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax.engine.types import Rows, Writing
from memcache_jax.engine.write import initial_states, write_at_once, write_in_turn

DIMS = (8, 16, 32, 64)  # of keys and values


def seconds(
    memory: Any, chunk: int, dim: int, *, length: int, heads: int, rounds: int
) -> tuple[float, float]:
    """Processor seconds of a gradient, least of the rounds: chunk after chunk, and at once.

    Other work on the machine adds little to processor time, and the two run in turn.

    Args:
      memory: an affine rule.
      chunk: tokens of a chunk, and of a segment.
      dim: of keys and values.
      length: tokens.
      heads: independent memories.
      rounds: timed rounds.
    """
    rows = _rows(memory, (1, heads, -(-length // chunk), 1, chunk), dim)
    restarts = np.arange(rows.key.shape[2]) == 0

    def initial(shape: tuple[int, ...]) -> Any:
        return initial_states(memory, {}, shape, dim, dim, jnp.float32)

    how = Writing(memory, ("reads",), initial, None)

    def gradient(write: Callable) -> Callable:
        def loss(rows: Rows) -> jax.Array:
            squares = [jnp.sum(x**2) for x in jax.tree.leaves(write(how, rows, restarts))]
            return jnp.stack(squares).sum()

        return jax.jit(jax.grad(loss)).lower(rows).compile()

    programs = [gradient(write) for write in (write_in_turn, write_at_once)]
    best = [float("inf")] * 2
    for warm in [True] + [False] * rounds:
        for i, run in enumerate(programs):
            begin = time.process_time()
            jax.block_until_ready(run(rows))
            if not warm:
                best[i] = min(best[i], time.process_time() - begin)
    return best[0], best[1]


def _rows(memory: Any, shape: tuple[int, ...], dim: int) -> Rows:
    """Random tokens, with keys of norm one and controls as a layer makes them from noise."""
    rng = np.random.default_rng(0)

    def noise(*last: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((*shape, *last)), jnp.float32)

    query, key, value = (noise(dim) for _ in range(3))
    key /= jnp.linalg.norm(key, axis=-1, keepdims=True)
    controls = {
        name: control.scale
        * control.activation(noise(*(dim for axis in control.axes.split()[-1:] if axis in "kv")))
        for name, control in memory.controls.items()
    }
    return Rows(query, key, value, controls)


def lines(rules: dict[str, Any], chunks: Iterable[int], **sizes: int) -> Iterable[str]:
    """The table, line by line."""
    yield f"{'rule':16} {'chunk':>5} {'k = v':>5} {'in turn, ms':>12} {'at once, ms':>12}"
    for name, memory in rules.items():
        for chunk in chunks:
            for dim in DIMS:
                in_turn, at_once = seconds(memory, chunk, dim, **sizes)
                yield f"{name:16} {chunk:5} {dim:5} {1e3 * in_turn:12.1f} {1e3 * at_once:12.1f}"
