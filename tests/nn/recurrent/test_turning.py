"""Rotations by angles that add up along a sequence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn import recurrent
from memcache_jax.nn.recurrent.turning import angles, next_angles, turned
from tests.cases import assert_close

MIXER = recurrent.mamba3(
    2, 4, state_dim=4, segmentation=mc.Constant(4), aggregation=mc.GRM(gate="uniform")
)


def layer_and_input(rows=1, length=16):
    x = np.random.default_rng(0).standard_normal((rows, length, 6))
    layer = MIXER.build(6, rngs=nnx.Rngs(0))
    step: Any = layer.coefficients[0]
    step.dt_bias[...] = jnp.ones(2)  # so that much is turned
    return layer, jnp.asarray(x, jnp.float32)


def test_angles_are_exact_after_many_turns():
    turns = np.random.default_rng(0).uniform(0, 3, (1, 100_000, 1, 1)).astype(np.float32)
    zero = jnp.zeros((1, 1, 1))
    angle = angles(jnp.asarray(turns), zero, zero.astype(jnp.int32))
    wanted = 2 * np.pi * np.cumsum(np.float64(turns), axis=1)
    difference = np.asarray(angle) - wanted
    assert np.abs(np.angle(np.exp(1j * difference))).max() < 2e-4


@pytest.mark.parametrize("turn", [3.3e-3, 0.3, 1e-7])
def test_single_tokens_of_a_stream_turn_as_far_as_one_pass(turn):
    turns, count = jnp.full((1, 1, 1, 1), turn, jnp.float32), 100_000

    @jax.jit
    def stream(tail):
        def call(tail, _):
            angle, tail = next_angles(turns, tail, jnp.ones(1, jnp.int32))
            return tail, angle[0, 0, 0, 0]

        return jax.lax.scan(call, tail, length=count)[1]

    zero = jnp.zeros((1, 1, 1))
    whole = angles(jnp.broadcast_to(turns, (1, count, 1, 1)), zero, zero.astype(jnp.int32))
    got = np.asarray(stream(jnp.zeros((1, 2, 1))))
    np.testing.assert_array_equal(got, whole[0, :, 0, 0])
    wanted = 2 * np.pi * np.float64(np.float32(turn)) * count
    assert abs(np.angle(np.exp(1j * (np.float64(got[-1]) - wanted)))) < 1e-4


def test_a_token_that_is_not_finite_does_not_turn():
    rng = np.random.default_rng(0)
    row, turns = rng.standard_normal((1, 5, 1, 4)), rng.uniform(0, 1, (1, 5, 1, 2))
    tail, numbers = (jnp.zeros((1, 2, 2)), jnp.array([5])), (0.0, np.nan, np.inf)
    got = []
    for number in numbers:
        turns[0, 2] = number
        rows, after = turned((jnp.asarray(row),), jnp.asarray(turns), None, tail)
        got.append((rows[0], after))
    assert_close(got[1:], [got[0]] * 2, 0)


MESHES = {
    "Explicit": lambda: jax.make_mesh(
        (2, 2), ("seq", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    ),
    "Auto": lambda: mc.sharding.make_mesh(dict(seq=4, tensor=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", list(MESHES.values()), ids=list(MESHES))
def test_parts_of_a_mesh_turn_on(make):
    mesh = make()
    layer, x = layer_and_input()

    def run(layer, x):
        return layer(x), nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)

    wanted, gradient = jax.jit(run)(layer, x)
    with jax.set_mesh(mesh):
        laid = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "seq")))
        got, of_mesh = jax.jit(run)(layer, laid)
    assert_close(got, wanted, 1e-5)
    assert_close(of_mesh, gradient, 1e-5)


@pytest.mark.slow
def test_a_stream_turns_on_and_gradients_pass():
    layer, x = layer_and_input(rows=2, length=10)

    def stream(layer, x):
        cache, pieces = layer.init_cache(2, 12), []
        for begin in (0, 5):
            y, cache = layer.extend(x[:, begin : begin + 5], cache)
            pieces.append(y)
        return jnp.concatenate(pieces, axis=1)

    def both(run):
        def loss(layer):
            y = run(layer, x)
            return jnp.sum(y**2), y

        return nnx.jit(nnx.grad(loss, has_aux=True))(layer)

    gradient, y = both(stream)
    wanted, one_pass = both(lambda layer, x: layer(x))
    assert_close(y, one_pass, 1e-5)
    assert_close(gradient, wanted, 1e-5)
