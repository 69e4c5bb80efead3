"""Loops without axes of size one: the numbers are those of any loop."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from memcache_jax.streaming.loops import Slim, fori_loop, while_loop


def test_a_tree_comes_back_as_it_was():
    tree = dict(a=jnp.arange(6.0).reshape(1, 2, 1, 3), b=(jnp.int32(4), None), c=jnp.ones((1, 1)))
    slim = Slim.of(tree)
    assert [x.shape for x in slim.arrays] == [(2, 3), (), ()]
    jax.tree.map(np.testing.assert_array_equal, jax.jit(Slim.full)(slim), tree)
    assert jax.tree.structure(slim.full()) == jax.tree.structure(tree)


def test_loops_compute_what_loops_of_jax_do():
    x = jax.random.normal(jax.random.key(0), (3, 1, 4))

    def more(carry):
        count, x, key = carry
        return count + 1, jnp.sin(x) + x, jax.random.split(key, 1)[0]

    carry = jnp.int32(0), x, jax.random.key(1)
    count, got, key = jax.jit(lambda c: while_loop(lambda c: c[0] < 3, more, c))(carry)
    for _ in range(3):
        carry = more(carry)
    assert (int(count), got.shape, key == carry[2]) == (3, (3, 1, 4), True)
    np.testing.assert_allclose(got, carry[1], rtol=1e-6)
    np.testing.assert_allclose(fori_loop(3, lambda x: jnp.sin(x) + x, x), carry[1], rtol=1e-6)


def test_the_compiler_copies_no_array_of_the_carry():
    """As of a live state (b, h, tracks, in, out), read in one layout and kept in another."""
    state = jnp.ones((4, 3, 1, 16, 32))

    def step(carry):
        count, state, x = carry
        y = jnp.einsum("bhi,bhio->bho", x, state[:, :, 0])
        changed = jax.lax.dynamic_update_slice_in_dim(state, y[:1, :, None, None], count % 4, 0)
        return count + 1, changed, jnp.tanh(y[..., :16])

    def copied(loop):
        """Whether the state is in another layout within the loop."""

        def run(state):
            carry = jnp.int32(0), state, jnp.ones((4, 3, 16))
            return loop(lambda c: c[0] < 9, step, carry)[2]

        text = jax.jit(run).lower(state).compile().as_text()
        return "f32[4,3,1,16,32]{4,3,1,0,2}" in text

    assert copied(jax.lax.while_loop)
    assert not copied(while_loop)


def test_axes_that_a_mesh_may_divide_by_name_stay():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((1, 3)), PartitionSpec("x"))
        assert Slim.of(x).arrays[0].shape == (1, 3)
