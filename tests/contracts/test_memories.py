"""Every memory by itself: its chunked write against its token step, and its reads."""

import functools

import jax
import jax.numpy as jnp
import pytest

from memcache_jax.engine.read import bands_of
from tests.cases import MEMORIES, assert_close, one_head, with_slow

every_memory = pytest.mark.parametrize("memory", with_slow(MEMORIES, "linear"))


@functools.partial(jax.jit, static_argnums=0)
def steps(memory, state, anchor, key, value, controls):
    """The states after each token of one chunk."""
    states = []
    for t in range(key.shape[0]):
        state = memory.step(
            state, anchor, key[t], value[t], {name: x[t] for name, x in controls.items()}
        )
        states.append(state)
    return states


@functools.partial(jax.jit, static_argnums=0)
def write_and_read(memory, state, anchor, key, value, controls, query):
    """The state after one chunk, and the reads of its tokens."""
    end, chunk = memory.write(state, anchor, key, value, controls)
    return end, memory.read_online(chunk, query)


@functools.partial(jax.jit, static_argnums=0)
def read_each(memory, states, query):
    """The read of each state by its own query."""
    reads = (memory.read(memory.matrices(s), q[None]) for s, q in zip(states, query, strict=True))
    return jnp.concatenate(list(reads))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("length", [1, 2, 5])
@every_memory
def test_write_equals_steps(memory, length):
    state, key, value, controls, query = one_head(memory, length)
    states = steps(memory, state, state, key, value, controls)
    end, reads = write_and_read(memory, state, state, key, value, controls, query)
    assert_close(end, states[-1], 1e-12)
    assert_close(reads, read_each(memory, states, query), 1e-12)


@pytest.mark.usefixtures("x64")
@every_memory
def test_write_goes_on_in_the_middle_of_a_chunk(memory):
    anchor, key, value, controls, query = one_head(memory, 6)
    states = steps(memory, anchor, anchor, key, value, controls)
    rest = {name: x[2:] for name, x in controls.items()}
    end, reads = write_and_read(memory, states[1], anchor, key[2:], value[2:], rest, query[2:])
    assert_close(end, states[-1], 1e-12)
    assert_close(reads, read_each(memory, states[2:], query[2:]), 1e-12)


@pytest.mark.usefixtures("x64")
@every_memory
def test_gated_read_is_the_read_times_the_gate(memory):
    state, key, value, controls, query = one_head(memory, 5)
    end, _ = write_and_read(memory, state, state, key, value, controls, query)
    matrices, read = memory.matrices(end), jax.jit(memory.read)
    gate = jnp.array([0.0, 0.5, 1.0, 2.0, -1.0])
    wanted = gate[:, None] * read(matrices, query)
    assert_close(read(matrices, query, gate), wanted, 1e-14)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@every_memory
def test_pieces_add_up_to_the_read(memory):
    state, key, value, controls, query = one_head(memory, 6)
    state, _ = memory.write(state, state, key, value, controls)
    matrices, gate = memory.matrices(state), jnp.linspace(-1, 2, len(query))
    largest = max(m.size for m in matrices) // 2
    divide = bands_of(memory)
    bands = divide(
        matrices, query, lambda shapes: sum(rows * columns for rows, columns in shapes) <= largest
    )
    assert (len(bands) > 1) == (memory.form != "scan")
    parts = [band.read(band.matrices, band.query, gate) for band in bands]
    assert_close(sum(parts), memory.read(matrices, query, gate), 1e-12)
    (whole,) = divide(matrices, query, lambda shapes: True)
    assert_close(whole.read(whole.matrices, query), memory.read(matrices, query), 0)
