"""How exact composed runs are, beside the same tokens written in turn."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax.memories.base import Run

_STRENGTHS = (0.0, -1e-4, -1e-2, -1.0, -30.0, -200.0, -np.inf)
_SHARES = (0.3, 0.3, 0.3, 0.07, 0.01, 0.01, 0.01)
_DIM, _TOKENS = 8, 4  # of a head, and of a segment


def errors(memory: Any, segments: int) -> tuple[float, float]:
    """The largest difference of any prefix's matrix from float64: composed, and written in turn.

    Runs of four tokens are composed by an associative scan in float32. Keys have norm one, decays
    are from 1 to 0, and all other controls are uniform in [0, 1], ``beta`` in [0, 2].

    Args:
      memory: an affine rule whose runs compose.
      segments: how many there are.
    """
    tokens = _tokens(memory, segments)

    def initial(dtype: Any) -> Any:
        return memory.init({}, _DIM, _DIM, dtype)

    @jax.jit
    def in_turn(tokens: Any) -> jax.Array:
        def write(state: Any, tokens: Any) -> Any:
            state, _ = memory.write(state, state, *tokens)
            return state, state.matrix

        return jax.lax.scan(write, initial(tokens[0].dtype), tokens)[1]

    @jax.jit
    def composed(tokens: Any) -> jax.Array:
        def run(key: Any, value: Any, controls: Any) -> Run:
            begun = Run(initial(key.dtype), memory.identity(_DIM, key.dtype))
            return memory.write_map(begun, key, value, controls)[0]

        runs = jax.vmap(run)(*tokens)
        return jax.lax.associative_scan(jax.vmap(memory.compose), runs).state.matrix

    with jax.enable_x64(True):
        exact = np.asarray(in_turn(jax.tree.map(np.float64, tokens)))
    found = (np.asarray(run(tokens), np.float64) for run in (composed, in_turn))
    first, second = (float(np.abs(x - exact).max()) for x in found)
    return first, second


def _tokens(memory: Any, segments: int) -> tuple[Any, Any, dict[str, Any]]:
    """Random keys, values and controls of segments."""
    rng, shape = np.random.default_rng(0), (segments, _TOKENS)
    unit = functools.partial(np.linalg.norm, axis=-1, keepdims=True)

    def rows(normed: bool) -> Any:
        x = rng.standard_normal((*shape, _DIM))
        return np.float32(x / unit(x) if normed else x)

    controls = {}
    for name, control in memory.controls.items():
        size = (*shape, _DIM) if control.per_channel else shape
        if control.most == 0:  # the log of a decay
            controls[name] = rng.choice(_STRENGTHS, size, p=_SHARES)
        elif name == "kappa":  # where RWKV-7 erases
            controls[name] = rows(True)
        else:
            controls[name] = rng.uniform(0, 2 if name == "beta" else 1, size)
    key, value = rows(True), rows(False)
    return jax.tree.map(jnp.asarray, (key, value, {n: np.float32(x) for n, x in controls.items()}))
