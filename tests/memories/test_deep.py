"""Deep memories: what writing does to reads, and the form that kernels take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, assert_close, make_inputs, one_head


@pytest.mark.parametrize("depth", [1, 2])
def test_writing_moves_reads_toward_the_value(depth):
    memory = mc.memories.Titans(chunk_size=8, depth=depth)
    state, key, value, _, _ = one_head(memory, 8, dim=32)
    eta, kept = jnp.full((8,), 0.05), jnp.zeros((8,))
    controls = dict(log_alpha=kept, log_beta=jnp.full((8,), -3.0), eta=eta)
    errors, read, write = [], jax.jit(memory.read), jax.jit(lambda *xs: memory.write(*xs)[0])
    for _ in range(20):
        errors.append(float(np.mean((read(memory.matrices(state), key) - value) ** 2)))
        state = write(state, state, key, value, controls)
    assert errors[-1] < 0.2 * errors[0]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["titans", "titans_depth1", "dla"])
def test_a_chunk_ends_as_it_is_written(name):
    memory = MEMORIES[name]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 4, batch=1, heads=1))
    key, value, controls = jax.tree.map(
        lambda x: x[0, :, 0], [inputs[name] for name in ("key", "value", "controls")]
    )
    weights = {name: weight[0] for name, weight in inputs["weights"].items()}
    state = jax.tree.map(lambda x: x + 0.1, memory.init(weights, 4, 4, jnp.float64))
    end, _ = memory.write(state, state, key, value, controls)
    form = memory.descent(key, value, controls)
    got = form.end(tuple(part for part in state if part), memory.loss)
    assert_close(got, tuple(part for part in end if part), 1e-12)
