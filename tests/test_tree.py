"""The router that searches a tree: definition, cost and refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.sharding import make_mesh
from tests.cases import MEMORIES, assert_close, make_inputs
from tests.contracts.test_exact import run
from tests.streams import empty, over_time, streamed

MEMORY, LENGTH = MEMORIES["linear"], 40
SIZES = mc.Constant(2)
NARROW, WHOLE = mc.SSC(2, router=mc.Tree(2, 1)), mc.SSC(2, router=mc.Tree(2, 9))
IDS = np.repeat([[0, 1, 2], [0, 1, 2]], [7, 20, 13], axis=1)


def inputs_of(length=LENGTH, dtype: Any = np.float64):
    return make_inputs(MEMORY, length, dtype=dtype)


def outputs(inputs, kind, ids=None, how=None):
    return run(inputs, MEMORY, ((kind, SIZES, "independent"),), ids, how)[0]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ids", [None, pytest.param(IDS, marks=pytest.mark.exhaustive)])
def test_it_selects_what_the_equations_select(ids):
    inputs = inputs_of()
    got, wanted = (
        jax.value_and_grad(
            lambda x, how=how: (y := outputs(x, NARROW, ids, how), jnp.sum(y**2))[::-1],
            has_aux=True,
        )(inputs)
        for how in (None, "reference")
    )
    assert_close(got, wanted, 1e-10)
    assert np.abs(got[0][1] - outputs(inputs, mc.SSC(2), ids)).max() > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_streams_keep_nodes():
    inputs = inputs_of()
    got = streamed(inputs, MEMORY, NARROW, SIZES, split=(33, 1, 6))
    assert_close(got, outputs(inputs, NARROW), 1e-12)
    cache = empty(inputs, MEMORY, NARROW, SIZES)
    assert cache.pooled.shape[2] == (19 + 1) + 9 + 4 + 2  # 19 states, and levels 1 to 3


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_beam_that_holds_all_nodes_is_ssc():
    inputs = inputs_of()
    assert_close(outputs(inputs, WHOLE), outputs(inputs, mc.SSC(2)), 1e-12)
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((5, 64)))
    best = np.argsort(-scores, axis=-1)[:, :4]
    np.testing.assert_array_equal(mc.Tree(2, 32).chosen(4, scores), best)
    assert (mc.Tree(2, 31).levels(64), mc.Tree(2, 32).levels(64)) == (1, 0)


@pytest.mark.slow
def test_no_output_depends_on_the_length():
    inputs = inputs_of(dtype=np.float32)
    prefix = over_time(inputs, MEMORY, lambda x: x[:, :13]) | {"weights": {}}
    assert_close(outputs(prefix, NARROW), outputs(inputs, NARROW)[:, :13], 1e-5)


def test_of_equals_the_older_is_selected():
    same = jnp.zeros((1, 24))

    def chosen(tree, top_k, scores):
        return jax.jit(tree.chosen, static_argnums=0)(top_k, scores).tolist()

    assert chosen(mc.Tree(2, 2), 2, same) == [[0, 1]]
    hidden = same.at[0, :9].set(-jnp.inf).at[0, 21:].set(-jnp.inf)  # a document from the 9th on
    assert chosen(mc.Tree(3, 2), 3, hidden) == [[9, 10, 11]]
    assert chosen(mc.Tree(3, 2), 3, jnp.full((1, 24), -jnp.inf)) == [[-1, -1, -1]]


def test_cost_grows_with_the_logarithm():
    tree = mc.Tree(16, 4)
    assert [tree.compared(n) for n in (64, 1024, 4096, 65536)] == [64, 143, 174, 174 + 79]


@pytest.mark.slow
def test_an_unknown_key_is_as_in_ssc():
    inputs = inputs_of(dtype=np.float32)
    inputs["key"][0, 9, 1, 0] = np.nan
    got, wanted = (np.isnan(outputs(inputs, kind)) for kind in (NARROW, mc.SSC(2)))
    np.testing.assert_array_equal(got, wanted)
    assert wanted[0, 10:, 1].all()
    assert not wanted[:, :, 0].any()


@pytest.mark.slow
def test_meshes():
    inputs = inputs_of(32, np.float32)
    wanted = outputs(inputs, NARROW, IDS[:, :32])
    with jax.set_mesh(make_mesh(dict(data=2, seq=2), devices=jax.devices()[:4])):
        assert_close(outputs(inputs, NARROW, IDS[:, :32]), wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_selected_states_bring_their_tokens():
    inputs, kind = inputs_of(), mc.SSC(2, router=mc.Tree(2, 1), exact=1)
    wanted = outputs(inputs, kind, None, "reference")
    assert_close(outputs(inputs, kind), wanted, 1e-12)
    assert_close(streamed(inputs, MEMORY, kind, SIZES, split=(33, 1, 6)), wanted, 1e-12)


def test_refusals():
    wrongs: tuple[dict[str, Any], ...] = dict(gate="uniform"), dict(num_keys=2)
    for wrong in wrongs:
        with pytest.raises(ValueError, match="a router with a Tree averages keys"):
            mc.SSC(2, router=mc.Tree(), **wrong)
    with pytest.raises(ValueError, match=r"top_k of at most beam \* branching = 2, got 3"):
        mc.SSC(3, router=mc.Tree(2, 1))
    how: dict[str, Any] = dict(memory=MEMORY, aggregation=NARROW)
    for segmentation in (mc.Logarithmic(2), mc.Lengths((2, 4)), mc.Adaptive(2, 4)):
        with pytest.raises(ValueError, match="needs Constant segments, got"):
            mc.init_cache(1, 1, 4, 4, **how, segmentation=segmentation, max_length=6)
    with pytest.raises(ValueError, match="needs a cache that keeps all states, policy='error'"):
        mc.init_cache(1, 1, 4, 4, **how, segmentation=SIZES, max_segments=9, policy="drop_oldest")
