"""Every memory by itself: its chunked write against its token step, and what it stores."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine.read import pieces_of
from memcache_jax.kernels.decay import decay_matrix
from tests.cases import MEMORIES, assert_close, make_inputs

every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)


def one_head(memory, length, **options):
    """Unbatched tokens and the initial state of one head."""
    inputs = make_inputs(memory, length, batch=1, heads=1, **options)
    tokens = inputs["key"], inputs["value"], inputs["controls"], inputs["query"]
    # Constants of a head have one axis; all else is (b, t, h, ...).
    tokens = jax.tree.map(lambda x: x[0, :, 0] if x.ndim > 1 else x.repeat(length), tokens)
    weights = {name: weight[0] for name, weight in inputs["weights"].items()}
    (key, value, controls, query), weights = jax.tree.map(jnp.asarray, (tokens, weights))
    state = memory.init(weights, key.shape[-1], value.shape[-1], key.dtype)
    return state, key, value, controls, query


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


@pytest.mark.parametrize("depth", [1, 2])
def test_writing_moves_reads_toward_the_value(depth):
    memory = mc.memories.Titans(chunk_size=8, depth=depth)
    state, key, value, _, _ = one_head(memory, 8, dim=32)
    eta, kept = jnp.full((8,), 0.05), jnp.zeros((8,))
    controls = dict(log_alpha=kept, log_beta=jnp.full((8,), -3.0), eta=eta)
    errors, read = [], jax.jit(memory.read)
    for _ in range(20):
        errors.append(float(np.mean((read(memory.matrices(state), key) - value) ** 2)))
        state, _ = write_and_read(memory, state, state, key, value, controls, key)
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


@pytest.mark.parametrize("memory", [mc.memories.LinearAttention(), mc.memories.Titans()])
def test_gradients_of_gates_are_summed_in_float32(memory):
    shapes = {1: [(4, 4)], 2: [(4, 16), (16, 4)]}[memory.depth]
    matrices = tuple(jnp.ones(shape, jnp.bfloat16) for shape in shapes)
    query, gate = jnp.ones((3, 4), jnp.bfloat16), jnp.ones(3, jnp.bfloat16)

    def gradient(gate, cotangent):
        return jax.vjp(lambda gate: memory.read(matrices, query, gate), gate)[1](cotangent)[0]

    sums = re.findall(r"(\w+)\[[0-9,]*\] = reduce_sum", str(jax.make_jaxpr(gradient)(gate, query)))
    assert sums
    assert {*sums} == {"f32"}


@pytest.mark.usefixtures("x64")
@every_memory
def test_pieces_add_up_to_the_read(memory):
    state, key, value, controls, query = one_head(memory, 6)
    state, _ = memory.write(state, state, key, value, controls)
    matrices, gate = memory.matrices(state), jnp.linspace(-1, 2, len(query))
    largest = max(m.size for m in matrices) // 2
    divide = pieces_of(memory)
    pieces = divide(
        matrices, query, lambda shapes: sum(rows * columns for rows, columns in shapes) <= largest
    )
    assert (len(pieces) > 1) == (memory.form != "scan")
    parts = [piece.read(piece.matrices, piece.query, gate) for piece in pieces]
    assert_close(sum(parts), memory.read(matrices, query, gate), 1e-12)
    (whole,) = divide(matrices, query, lambda shapes: True)
    assert_close(whole.read(whole.matrices, query), memory.read(matrices, query), 0)


def test_a_read_of_ones_own_is_not_divided():
    class Normalized(mc.memories.LinearAttention):
        def read(self, matrices, query, gate=None):
            y = super().read(matrices, query, gate)
            return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

    divide = pieces_of(Normalized())
    pieces = divide((jnp.ones((4, 4)),), jnp.ones((2, 4)), lambda shapes: False)
    assert len(pieces) == 1


class Doubled(mc.memories.SSD):
    def forward(self, apply, query, gate=None):
        return super().forward(apply, 2 * query, gate)


class FromOnes(mc.memories.SSD):
    def init(self, weights, key_dim, value_dim, dtype):
        state = super().init(weights, key_dim, value_dim, dtype)
        return jax.tree.map(jnp.ones_like, state)


class Both:
    def affine(self, before, key, value, query, controls):
        owner: Any = super()
        return owner.affine(before, key, value, query, controls)


class Mixed(Both, mc.memories.SSD):
    pass


@pytest.mark.parametrize("memory", [Doubled(), FromOnes(), Mixed()], ids=lambda x: type(x).__name__)
def test_a_class_that_does_something_its_own_way_is_served_by_its_own_methods(memory):
    assert mc.memories.SSD().form == "affine"
    assert memory.form != "affine"
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 24, batch=1, heads=1, dtype=np.float32))
    run = functools.partial(
        mc.memory_caching,
        **inputs,
        memory=memory,
        aggregation=mc.Residual(),
        segmentation=mc.Constant(8),
    )
    assert_close(run(), run(implementation="reference"), 1e-6)


def test_an_aggregation_that_reads_the_live_memory_its_own_way():
    class Halved(mc.Residual):
        def needs(self, memory):
            return ("layers",)

        def read(self, bank, live, query, selection):
            own = bank.memory.forward(live.apply, query / 2)
            return own + bank.read(query, selection)

    memory = mc.memories.SSD()
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 24, batch=1, heads=1, dtype=np.float32))
    run = functools.partial(mc.memory_caching, memory=memory, segmentation=mc.Constant(24))
    wanted = run(**inputs | {"query": inputs["query"] / 2}, aggregation=mc.Residual())
    assert_close(run(**inputs, aggregation=Halved()), wanted, 1e-6)
