"""Every memory by itself: its chunked write against its token step, and what it stores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.memories._decay import decay_matrix
from tests.cases import MEMORIES, assert_close, make_inputs

every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)


def one_head(memory, length, seed=0):
    """Unbatched tokens and the initial state of one head."""
    inputs = make_inputs(memory, length, batch=1, heads=1, seed=seed)
    take = functools.partial(jax.tree.map, lambda x: x[0, :, 0])
    for name, control in inputs["controls"].items():
        if control.ndim == 1:  # one for each head
            inputs["controls"][name] = jnp.broadcast_to(control[None, None], (1, length, 1))
    key, value, controls = take((inputs["key"], inputs["value"], inputs["controls"]))
    weights = jax.tree.map(lambda x: x[0], inputs["weights"])
    state = memory.init(weights, key.shape[-1], value.shape[-1], key.dtype)
    return state, key, value, controls, take(inputs["query"])


def steps(memory, state, anchor, key, value, controls):
    """The states after each token of one chunk."""
    states = []
    for t in range(key.shape[0]):
        state = memory.step(
            state, anchor, key[t], value[t], {name: x[t] for name, x in controls.items()}
        )
        states.append(state)
    return states


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("length", [1, 2, 5])
@every_memory
def test_write_equals_steps(memory, length):
    state, key, value, controls, query = one_head(memory, length)
    states = steps(memory, state, state, key, value, controls)
    end, chunk = memory.write(state, state, key, value, controls)
    assert_close(end, states[-1], 1e-12)
    reads = [
        memory.read(memory.matrices(s), q[None])[0] for s, q in zip(states, query, strict=True)
    ]
    assert_close(memory.read_online(chunk, query), jnp.stack(reads), 1e-12)


@pytest.mark.usefixtures("x64")
@every_memory
def test_write_goes_on_in_the_middle_of_a_chunk(memory):
    anchor, key, value, controls, query = one_head(memory, 6)
    states = steps(memory, anchor, anchor, key, value, controls)
    rest = {name: x[2:] for name, x in controls.items()}
    end, chunk = memory.write(states[1], anchor, key[2:], value[2:], rest)
    assert_close(end, states[-1], 1e-12)
    read = memory.read(memory.matrices(states[3]), query[3:4])[0]
    assert_close(memory.read_online(chunk, query[2:])[1], read, 1e-12)


@pytest.mark.usefixtures("x64")
@every_memory
def test_gated_read_is_the_read_times_the_gate(memory):
    state, key, value, controls, query = one_head(memory, 5)
    matrices = memory.matrices(memory.write(state, state, key, value, controls)[0])
    gate = jnp.array([0.0, 0.5, 1.0, 2.0, -1.0])
    wanted = gate[:, None] * memory.read(matrices, query)
    assert_close(memory.read(matrices, query, gate), wanted, 1e-14)


@pytest.mark.parametrize("depth", [1, 2])
def test_writing_moves_reads_toward_the_value(depth):
    memory = mc.memories.Titans(chunk_size=8, depth=depth)
    inputs = make_inputs(memory, 8, batch=1, heads=1, dim=32)
    key, value = inputs["key"][0, :, 0], inputs["value"][0, :, 0]
    state = memory.init({n: w[0] for n, w in inputs["weights"].items()}, 32, 32, key.dtype)
    eta, kept = jnp.full((8,), 0.05), jnp.zeros((8,))
    controls = dict(log_alpha=kept, log_beta=jnp.full((8,), -3.0), eta=eta)
    errors = []
    for _ in range(20):
        errors.append(float(jnp.mean((memory.read(memory.matrices(state), key) - value) ** 2)))
        state, _ = memory.write(state, state, key, value, controls)
    assert errors[-1] < 0.2 * errors[0]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.usefixtures("x64")
def test_decay_matrix():
    log_decay = -jax.random.uniform(jax.random.key(0), (7,)) * 20
    got = decay_matrix(log_decay)
    for t in range(7):
        for j in range(7):
            wanted = np.exp(log_decay[j + 1 : t + 1].sum()) if j <= t else 0.0
            np.testing.assert_allclose(got[t, j], wanted, rtol=1e-12)


def test_decay_matrix_keeps_small_decays_after_strong_ones():
    log_decay = jnp.array([-1e4, -1e4, -1e-3, -1e-3], jnp.float32)
    np.testing.assert_allclose(decay_matrix(log_decay)[3, 1], np.exp(-2e-3), rtol=1e-6)
