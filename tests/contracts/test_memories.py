"""Every memory by itself: its chunked write against its token step, and its reads."""

import jax
import jax.numpy as jnp
import pytest

from memcache_jax.engine.read import bands_of
from tests.cases import MEMORIES, assert_close, one_head, with_slow

PADDED = {name: memory for name, memory in MEMORIES.items() if memory.takes_padding}
every_memory = pytest.mark.parametrize("memory", with_slow(MEMORIES, "linear"))


def steps(memory, state, anchor, key, value, controls):
    """The states after each token of one chunk."""
    states = []
    for t in range(key.shape[0]):
        state = memory.step(
            state, anchor, key[t], value[t], {name: x[t] for name, x in controls.items()}
        )
        states.append(state)
    return states


def write_and_read(memory, state, anchor, key, value, controls, query):
    """The state after one chunk, and the reads of its tokens."""
    end, chunk = memory.write(state, anchor, key, value, controls)
    return end, memory.read_online(chunk, query)


def read_each(memory, states, query):
    """The read of each state by its own query."""
    reads = (memory.read(memory.matrices(s), q[None]) for s, q in zip(states, query, strict=True))
    return jnp.concatenate(list(reads))


@pytest.mark.usefixtures("x64")
@every_memory
def test_write_equals_steps(memory):
    """From the first token, some of them, and from the middle of a chunk, in one program."""
    anchor, *tokens = one_head(memory, 6)

    @jax.jit
    def both(anchor, tokens):
        *written, query = tokens
        states = [anchor, *steps(memory, anchor, anchor, *written)]
        got, wanted = [], []
        for begin, end in ((0, 1), (0, 2), (0, 5), (2, 6)):
            chunk = jax.tree.map(lambda x, b=begin, e=end: x[b:e], tokens)
            got.append(write_and_read(memory, states[begin], anchor, *chunk))
            reads = read_each(memory, states[begin + 1 : end + 1], query[begin:end])
            wanted.append((states[end], reads))
        return got, wanted

    got, wanted = both(anchor, tokens)
    assert_close(got, wanted, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", with_slow(PADDED, "swla"))
def test_zeros_may_fill_a_chunk(memory):
    """The state, the run's map and the reads of the tokens that zeros follow."""
    before, *tokens = one_head(memory, 6)
    runs = memory.merges and not memory.weight_shapes(4, 4)

    @jax.jit
    def both(before, tokens):
        got, wanted = [], []
        for count in (1, 4, 6):
            zero = jax.tree.map(lambda x, n=count: x.at[n:].set(0), tokens)
            some = jax.tree.map(lambda x, n=count: x[:n], tokens)
            end, y = write_and_read(memory, before, before, *zero)
            key, value = zero[:2]
            end = memory.without_padding(end, key, value, jnp.int32(count))
            got.append((end, y[:count]))
            wanted.append(write_and_read(memory, before, before, *some))
            for found, its in ((got, zero), (wanted, some)) if runs else ():
                identity = memory.identity(key.shape[1], key.dtype)
                found.append(memory.extended(identity, *its[:3]))
        return got, wanted

    got, wanted = both(before, tokens)
    assert_close(got, wanted, 1e-12)


@pytest.mark.usefixtures("x64")
@every_memory
def test_gated_read_is_the_read_times_the_gate(memory):
    state, key, value, controls, query = one_head(memory, 5)
    gate = jnp.array([0.0, 0.5, 1.0, 2.0, -1.0])

    @jax.jit
    def both(state, tokens):
        end, _ = memory.write(state, state, *tokens)
        matrices = memory.matrices(end)
        return memory.read(matrices, query, gate), gate[:, None] * memory.read(matrices, query)

    gated, wanted = both(state, (key, value, controls))
    assert_close(gated, wanted, 1e-14)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@every_memory
def test_pieces_add_up_to_the_read(memory):
    state, *tokens, query = one_head(memory, 6)
    divide, gate = bands_of(memory), jnp.linspace(-1, 2, len(query))

    @jax.jit
    def reads(state, tokens):
        state, _ = memory.write(state, state, *tokens)
        matrices = memory.matrices(state)
        largest = max(m.size for m in matrices) // 2
        bands = divide(
            matrices, query, lambda shapes: sum(rows * cols for rows, cols in shapes) <= largest
        )
        assert (len(bands) > 1) == (memory.form != "scan")
        parts = [band.read(band.matrices, band.query, gate) for band in bands]
        (whole,) = divide(matrices, query, lambda shapes: True)
        undivided = whole.read(whole.matrices, query)
        read = memory.read(matrices, query)
        return sum(parts), memory.read(matrices, query, gate), undivided, read

    parts, gated, undivided, read = reads(state, tokens)
    assert_close(parts, gated, 1e-12)
    assert_close(undivided, read, 0)
