"""Attention to a memory's context alone; see test_memory_as_context.py for the equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memcache_jax.nn.context_attention import ContextAttention


@pytest.fixture(scope="module")
def layer():
    return ContextAttention(8, 2, window=4, num_persistent=2, rngs=nnx.Rngs(0))


def test_windows_do_not_slide(layer):
    """A change of token 4 reaches its window, of tokens 4 to 7, from itself on."""
    x = jax.random.normal(jax.random.key(0), (1, 12, 16))
    whole = nnx.jit(lambda layer, x: layer(x))
    moved = jnp.abs(whole(layer, x.at[0, 4].add(1.0)) - whole(layer, x)).max(axis=(0, 2))
    assert (moved > 1e-4).tolist() == [4 <= token < 8 for token in range(12)]


def test_without_tokens(layer):
    assert layer(jnp.zeros((1, 0, 16))).shape == (1, 0, 8)


def test_masks_are_refused(layer):
    with pytest.raises(ValueError, match="takes no mask"):
        layer(jnp.ones((1, 4, 16)), mask=np.eye(4, dtype=bool))
