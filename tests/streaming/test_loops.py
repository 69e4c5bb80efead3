"""Loops without axes of size one: results match those of JAX's loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import memcache_jax as mc
from memcache_jax.streaming.loops import Slim, fori_loop, while_loop
from tests.cases import make_inputs
from tests.streams import empty, over_time


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


@pytest.mark.slow
def test_the_compiler_keeps_the_layout_of_states():
    """A live state (b, h, tracks, in, out), which single tokens of a deep memory read."""
    memory = mc.memories.Titans(chunk_size=4, expansion=2)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 1, dtype=np.float32))
    cache, token = (
        empty(inputs, memory, mc.GRM(), mc.Constant(8)),
        over_time(inputs, memory, lambda x: x),
    )

    def has_another(loop):
        """Whether a state has another layout within a loop over tokens."""

        def run(cache):
            return loop(
                lambda carry: carry[0] < 9,
                lambda carry: (carry[0] + 1, mc.extend(carry[1], **token)[1]),
                (jnp.int32(0), cache),
            )

        text = jax.jit(run).lower(cache).compile().as_text()
        assert text is not None
        return "f32[2,3,1,4,8]{4,3,1,0,2}" in text

    assert has_another(jax.lax.while_loop)
    assert not has_another(while_loop)


def test_axes_that_a_mesh_may_divide_by_name_stay():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((1, 3)), PartitionSpec("x"))
        assert Slim.of(x).arrays[0].shape == (1, 3)
