"""The softmax of gates: its values and its slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memcache_jax.kernels.gate_softmax import softmax_gates
from tests.cases import assert_close

pytestmark = pytest.mark.usefixtures("x64")


def test_gates_are_a_softmax_over_what_is_visible():
    cached = jnp.array([[1.0, -jnp.inf], [2.0, 0.5]])
    online = jnp.array([0.0, -1.0])
    gates = softmax_gates(cached, online)
    np.testing.assert_allclose(gates[0][0], [np.e / (1 + np.e), 0.0])
    np.testing.assert_allclose(gates[0].sum(axis=-1) + gates[1], 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("states", [0, 3])
def test_gates_have_the_slopes_of_a_softmax(states):
    scores, tangents = jax.random.normal(jax.random.key(0), (2, 4, states + 1))
    scores = scores.at[1:, : states - 1].set(-jnp.inf)

    def gates(scores):
        cached, online = softmax_gates(scores[:, :-1], scores[:, -1])
        return jnp.concatenate([cached, online[:, None]], axis=-1)

    def softmax(scores):
        return jax.nn.softmax(scores, axis=-1)

    def slopes(function):
        return jax.jvp(function, (scores,), (tangents,)), jax.vjp(function, scores)[1](tangents)

    assert_close(slopes(gates), slopes(softmax), 1e-14)
