"""Layers that read the cached states of another layer: the equation, streams, documents, meshes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.caching import in_group
from memcache_jax.sharding import make_mesh
from tests.cases import MEMORIES, make_inputs

OWN = mc.nn.MemoryCachingMixer(mc.memories.GatedDeltaNet(), mc.SSC(2), mc.Constant(4))
OTHER = dataclasses.replace(OWN, states="previous")
FOLLOWER = dataclasses.replace(OTHER, connector="previous")
LENGTH = 23
WIDE: Any = dict(dtype=jnp.float64, param_dtype=jnp.float64)


def model_of(*mixers, **options):
    config = mc.nn.LanguageModelConfig(
        17, 4, features=8, num_heads=2, mixers=mixers, mlp_features=8, **options
    )
    return mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))


def tokens_of(length=LENGTH):
    return jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, length)))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_equation_and_its_gradients():
    memory = MEMORIES["linear"]
    how: dict[str, Any] = dict(aggregation=mc.GRM(), segmentation=mc.Constant(3))
    drawn = [make_inputs(memory, 10, batch=1, heads=1, seed=seed) for seed in (0, 1)]
    one, other = jax.tree.map(jnp.asarray, drawn)

    def outputs(one, other):
        _, states = in_group(**one, memory=memory, **how, hands_on=True)
        return in_group(**other, given=states, memory=memory, **how)

    y = np.asarray(outputs(one, other))[0, :, 0]
    for t in range(10):
        first, segments = t // 3 * 3, [slice(i, i + 3) for i in range(0, t // 3 * 3, 3)]
        rows = [(one, part) for part in segments] + [(other, slice(first, t + 1))]
        keys, values = (
            [np.asarray(x[name][0, part, 0], np.float64) for x, part in rows]
            for name in ("key", "value")
        )
        scores = np.array([key.mean(axis=0) @ other["connector"][0, t, 0] for key in keys])
        gates = np.exp(scores - scores.max())
        reads = [v.T @ (k @ other["query"][0, t, 0]) for k, v in zip(keys, values, strict=True)]
        np.testing.assert_allclose(y[t], gates / gates.sum() @ np.stack(reads), atol=1e-10)
    gradient = jax.grad(lambda one: outputs(one, other).sum())(one)
    assert all(np.abs(gradient[name][0, :9]).max() > 0 for name in ("key", "value"))
    assert all(np.abs(gradient[name][0, 9]).max() == 0 for name in ("key", "value"))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("other", "scan"),
    [
        (OTHER, True),
        (FOLLOWER, True),
        pytest.param(FOLLOWER, False, marks=pytest.mark.exhaustive),
    ],
    ids=["states", "choice", "choice, no scan"],
)
def test_streams_are_one_pass_in_fewer_bytes(other, scan):
    model, tokens = model_of(OWN, other, scan_layers=scan, **WIDE), tokens_of()
    wanted, outputs = jax.jit(model.hidden)(tokens), []
    extend, cache = jax.jit(model.extend), model.init_cache(2, LENGTH)
    own = model_of(OWN, **WIDE).init_cache(2, LENGTH)
    for begin, end in ((0, 11), (11, 12), (12, LENGTH)):
        y, cache = extend(tokens[:, begin:end], cache)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), wanted, atol=1e-10)
    # Of two layers in four, 5 states of 4 x 4 and their pooled keys, of 2 rows and heads.
    states, slots = 2 * 2 * 2 * 5 * (4 * 4 + 4) * 8, 2 * 2 * 3 * 5 * 4
    assert own.nbytes - cache.nbytes == states + slots
    alike = cache.take(np.array([1, 0])).reset(np.array([True, False]))
    y, _ = extend(tokens[:1, :7].repeat(2, axis=0), alike)
    np.testing.assert_allclose(y[0], wanted[0, :7], atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_streams_read_no_state_of_later_tokens():
    """The layer that caches has taken the whole piece before the other one reads."""
    memory = MEMORIES["linear"]
    how: dict[str, Any] = dict(aggregation=mc.GRM(), segmentation=mc.Constant(2))
    one, other = (
        jax.tree.map(jnp.asarray, make_inputs(memory, 6, batch=1, heads=1, seed=seed))
        for seed in (0, 1)
    )
    one["key"] = one["key"].at[0, 3].set(jnp.nan)

    @jax.jit
    def both(one, other):
        _, states = in_group(**one, memory=memory, **how, hands_on=True)
        empty = mc.init_cache(1, 1, 4, 4, memory=memory, **how, max_length=6, dtype=jnp.float64)
        after = mc.extend(empty, **one)[1]
        y = mc.extend(empty.as_borrower().borrowing(after), **other)[0]
        return in_group(**other, given=states, memory=memory, **how), y

    wanted, y = both(one, other)
    assert np.isnan(wanted[0]).any(axis=(1, 2)).tolist() == [False] * 4 + [True] * 2
    np.testing.assert_allclose(y, wanted, atol=1e-12)


def test_followers_need_no_tree():
    """The first layer alone searches it."""
    tree = mc.SSC(2, router=mc.Tree(2, 1))
    model = model_of(*(dataclasses.replace(x, aggregation=tree) for x in (OWN, FOLLOWER)))
    cache, tokens = model.init_cache(2, LENGTH), tokens_of()
    (hidden, _), whole = jax.eval_shape(lambda: (model.extend(tokens, cache), model(tokens)))
    assert hidden.shape[:2] == whole.shape[:2] == tokens.shape


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_documents():
    model, tokens = model_of(OWN, OTHER, FOLLOWER, OTHER, **WIDE), tokens_of()
    both = model.hidden(tokens, jnp.asarray([[0] * 8 + [1] * 15] * 2))
    np.testing.assert_allclose(both[:, :8], model.hidden(tokens[:, :8]), atol=1e-10)
    np.testing.assert_allclose(both[:, 8:], model.hidden(tokens[:, 8:]), atol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_meshes_and_training():
    model, tokens = model_of(OWN, OTHER, FOLLOWER, OTHER, remat=True, **WIDE), tokens_of(24)
    graph, state = nnx.split(model)

    def loss(state, tokens):
        y = nnx.merge(graph, state).hidden(tokens)
        return jnp.mean(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    wanted = jax.jit(jax.value_and_grad(loss))(state, tokens)
    with jax.set_mesh(make_mesh(dict(data=2, tensor=2), devices=jax.devices()[:4])):
        got = jax.jit(jax.value_and_grad(loss))(state, tokens)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), got, wanted)
    refused = pytest.raises(ValueError, match="share cached states need whole sequences")
    with jax.set_mesh(make_mesh(dict(seq=2), devices=jax.devices()[:2])), refused:
        jax.jit(loss)(state, tokens)


def test_refusals():
    with pytest.raises(ValueError, match=r"needs one with its own states before it.*scan_layers"):
        model_of(OTHER)
    with pytest.raises(ValueError, match="share states need the same aggregation, got"):
        model_of(OWN, dataclasses.replace(OTHER, aggregation=mc.GRM()))
    with pytest.raises(ValueError, match="states need the same start, got independent, checkpoint"):
        model_of(OWN, dataclasses.replace(OTHER, start="checkpoint"))
    with pytest.raises(ValueError, match="needs gates that tell states apart"):
        model_of(*(dataclasses.replace(x, aggregation=mc.Residual()) for x in (OWN, OTHER)))
    with pytest.raises(ValueError, match="right of ParallelMixer needs states='own', got"):
        model_of(OWN, mc.nn.ParallelMixer(OWN, OTHER))
    for wrong in (dict(states="own"), dict(aggregation=mc.GRM())):
        with pytest.raises(ValueError, match="connector='previous' is what SSC chose"):
            dataclasses.replace(FOLLOWER, **wrong)
    changes: tuple[dict[str, Any], ...] = (
        *(dict(segmentation=mc.Logarithmic(4)), dict(aggregation=mc.GRM(exact=1))),
    )
    for wrong in changes:
        with pytest.raises(ValueError, match="states='previous' needs Constant segments, exact=0"):
            dataclasses.replace(OTHER, **wrong)
    with pytest.raises(ValueError, match="another implementation than 'reference'"):
        dataclasses.replace(OTHER, implementation="reference")
    with pytest.raises(ValueError, match="another implementation than 'reference'"):
        model_of(dataclasses.replace(OWN, implementation="reference"), OTHER)
    model = model_of(OWN, OTHER)
    refused: tuple[dict[str, Any], ...] = dict(rewind=2), dict(policy="drop_oldest", max_segments=2)
    for options in refused:
        with pytest.raises(ValueError, match="need a cache with policy='error' and rewind=0"):
            model.init_cache(2, LENGTH, **options)
    with pytest.raises(ValueError, match="cannot keep_ends"):
        model.init_cache(2, LENGTH, keep_ends=True)
    with pytest.raises(ValueError, match="works only in the blocks of a LanguageModel"):
        model.gates(tokens_of())
