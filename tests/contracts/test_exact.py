"""Tokens kept exactly beside cached states: every path agrees with the equations."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.kernels._dispatch import interpret_kernels
from memcache_jax.sharding import make_mesh
from tests.cases import (
    FAMILIES,
    MEMORIES,
    assert_close,
    make_inputs,
    scheduled,
    value_and_vjp,
)
from tests.contracts.test_borders import IDS, LENGTH, topics
from tests.covers import kept_of, product
from tests.streams import empty, over_time

GRM, SSC = mc.GRM(exact=3), mc.SSC(top_k=1, exact=2)
CONSTANT = mc.Constant(8)
CASES = (
    (GRM, CONSTANT, "independent"),
    (SSC, mc.Lengths((8, 16, 12, 40)), "checkpoint"),
    (mc.SSC(top_k=2, gate="uniform", exact=8), mc.Adaptive(8, 16, 0.5, block=4), "independent"),
)


@functools.partial(jax.jit, static_argnames=("memory", "cases", "implementation", "exchange"))
def run(inputs, memory, cases=CASES, ids=None, implementation=None, exchange: Any = "gather"):
    with scheduled("in_turn"):
        return [
            mc.memory_caching(
                **inputs,
                memory=memory,
                aggregation=aggregation,
                segmentation=segmentation,
                start=start,
                document_ids=ids,
                implementation=implementation,
                exchange=exchange,
            )
            for aggregation, segmentation, start in cases
        ]


@functools.partial(jax.jit, static_argnames=("memory", "case", "calls", "rewind", "options"))
def streamed(inputs, memory, case, calls, rewind=(), options=()):
    """The outputs of calls over these tokens, and the cache; before some calls rows go back."""
    aggregation, segmentation, start = case
    cache = empty(inputs, memory, aggregation, segmentation, start, **dict(options))
    outputs = []
    with scheduled("in_turn"):
        for number, (begin, end) in enumerate(calls):
            cache = (
                cache.rewind(np.array(dict(rewind)[number])) if number in dict(rewind) else cache
            )
            part = over_time(inputs, memory, lambda x, b=begin, e=end: x[:, b:e])
            y, cache = mc.extend(cache, **part)
            outputs.append(y)
    return outputs, cache


NAMED: dict[str, Any] = dict(zip(("constant", "lengths", "adaptive"), CASES, strict=True))
NAMED["keys"] = (mc.SSC(1, num_keys=2, exact=2), CONSTANT, "independent")
RULES, FAST = [*FAMILIES, "vector", "erasing"], [("gated_deltanet", "constant")]
CALLS = ((0, 19), (19, 20), (20, LENGTH))


@pytest.mark.usefixtures("x64")
class TestEveryForm:
    """Rules of each form, in float64."""

    @pytest.mark.parametrize("rule", kept_of(RULES, "linear", "titans", "vector"))
    def test_reference_documents_and_gradients(self, rule):
        memory = MEMORIES[rule]
        cases = CASES if rule in FAMILIES else CASES[:1]  # a read that ignores the query
        fast, plain = (
            value_and_vjp(
                lambda inputs, how=how: run(inputs, memory, cases, IDS, how), topics(memory)
            )
            for how in (None, "reference")
        )
        assert_close(fast, plain, 1e-9)

    @pytest.mark.parametrize(("rule", "case"), product(FAMILIES, NAMED, turn=1, fast=FAST))
    def test_streams(self, rule, case):
        inputs = topics(rule)
        (wanted,) = run(inputs, rule, (case,))
        outputs, _ = streamed(inputs, rule, case, CALLS)
        assert_close(jnp.concatenate(outputs, axis=1), wanted, 1e-12)


@pytest.mark.slow
def test_rows_go_back_over_a_segments_end():
    memory = MEMORIES["linear"]
    inputs = topics(memory, np.float32)
    calls, options = ((0, 30), (22, LENGTH)), (("rewind", 8),)
    (_, last), _ = streamed(inputs, memory, CASES[0], calls, ((1, (8, 8)),), options)
    (wanted,) = run(inputs, memory, CASES[:1])
    assert_close(last, wanted[:, 22:], 1e-5)


@pytest.mark.usefixtures("x64")
def test_with_all_tokens_and_no_states_it_is_attention():
    """Empty queries read nothing from a matrix: what is left is the softmax over tokens."""
    inputs = make_inputs(MEMORIES["linear"], 24, batch=1, heads=1, dtype=np.float64)
    inputs["query"][:] = 0
    (y,) = run(inputs, MEMORIES["linear"], ((mc.GRM(exact=8), CONSTANT, "independent"),))
    key, value, connector = (inputs[name][0, :, 0] for name in ("key", "value", "connector"))
    for t in (8, 15, 16, 23):
        first = t // 8 * 8
        scores = np.exp(key[:first] @ connector[t])
        pooled = [key[i : i + 8].mean(axis=0) for i in range(0, first, 8)]
        pooled.append(key[first : t + 1].mean(axis=0))
        others = np.exp(np.array(pooled) @ connector[t]).sum()
        share = scores.sum() / (scores.sum() + 8 * others)
        np.testing.assert_allclose(y[0, t, 0] / share, scores @ value[:first] / scores.sum())


def test_keeps_what_the_cached_state_recalls_worst():
    """A pair whose key comes again with another value, which a delta rule overwrites."""
    dim = 16
    key = np.eye(dim)[[0, 1, 2, 3, 4, 5, 0, 6, 7, 7]][None, :, None]
    value = np.random.default_rng(0).standard_normal((1, 10, 1, dim))
    inputs: dict[str, Any] = dict(query=key * 0, key=key, value=value, connector=100 * key)
    inputs["controls"] = {"beta": np.ones((1, 10, 1))}
    inputs["connector"][0, 9, 0] = 100 * np.eye(dim)[0]
    inputs = jax.tree.map(lambda x: x.astype(np.float32), inputs)
    memory = mc.memories.DeltaNet()
    (y,) = run(inputs, memory, ((mc.GRM(exact=1), CONSTANT, "independent"),))
    np.testing.assert_allclose(y[0, 9], inputs["value"][0, 0], rtol=1e-5)


def test_meshes():
    memory = MEMORIES["gated_deltanet"]
    inputs = make_inputs(memory, 64, heads=2, dtype=np.float32)
    ids = np.repeat([[0, 1, 2, 3], [0, 0, 1, 2]], [13, 13, 6, 32], axis=1)
    wanted = run(inputs, memory, CASES[:1], ids)
    for exchange, sizes in (("gather", dict(data=2, seq=2)), ("ring", dict(tensor=2, seq=2))):
        with jax.set_mesh(make_mesh(sizes, devices=jax.devices()[:4])):
            assert_close(run(inputs, memory, CASES[:1], ids, exchange=exchange), wanted, 1e-5)


def test_policies_drop_a_states_tokens():
    memory = MEMORIES["linear"]
    inputs = make_inputs(memory, 40, heads=1, dtype=np.float32)
    inputs["connector"] = np.random.default_rng(0).normal(size=(2, 40, 1, 6)).astype(np.float32)
    inputs["connector"][..., 3:] = -np.inf  # segments further back than those that are kept
    case = mc.GRM(gate="position", exact=2), CONSTANT, "independent"
    options = (("segments", 2), ("policy", "drop_oldest"))
    (y,), _ = streamed(inputs, memory, case, ((0, 40),), (), options)
    assert_close(y, run(inputs, memory, (case,))[0], 1e-5)
    # Reads of tokens count for their state: here nothing else has a gate worth counting.
    inputs["connector"] = 30 * inputs["key"]
    options = (("segments", 2), ("policy", "drop_least_read"))
    _, cache = streamed(inputs, memory, (GRM, *case[1:]), ((0, 24),), (), options)
    assert float(cache.record.gates.sum()) > 0.5 * 2 * 8


@pytest.mark.slow
def test_caches_hold_tokens_in_their_dtype():
    memory = MEMORIES["linear"]
    inputs = make_inputs(memory, LENGTH, heads=2, dtype=np.float32)
    wanted, sizes = run(inputs, memory, CASES[:1])[0], {}
    for name, tolerance in (("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.03)):
        (y,), cache = streamed(
            inputs, memory, CASES[0], ((0, LENGTH),), (), (("cache_dtype", name),)
        )
        assert_close(y, wanted, tolerance)
        sizes[name] = sum(x.nbytes for x in jax.tree.leaves(cache.bank))
    # In 2 rows and heads 5 states of 4 x 4, and 3 tokens of a key and a value of 4 each.
    assert sizes["float32"] == 2 * 2 * 5 * (4 * 4 + 3 * 8) * 4 == 2 * sizes["bfloat16"]
    assert sizes["int8"] == 2 * 2 * 5 * ((4 * 4 + 3 * 8) + (4 + 3 * 2) * 4)
    more = (
        cache.nbytes
        - streamed(
            inputs, memory, (mc.GRM(), *CASES[0][1:]), ((0, 1),), (), (("cache_dtype", "int8"),)
        )[1].nbytes
    )
    assert more == 2 * 2 * (5 * 3 * (8 + 2 * 4) + 8 * 8 * 4)


@pytest.mark.slow
def test_what_is_not_finite_or_comes_later_reaches_no_other_token():
    memory = MEMORIES["gated_deltanet"]
    inputs = topics(memory, np.float32)
    case = mc.SSC(top_k=1, exact=2), CONSTANT, "independent"
    ids = np.array([[0] * 12 + [1] * 33] * 2)

    def outputs(inputs):
        return run(inputs, memory, (case,), ids)[0]

    whole = outputs(inputs)
    later = over_time(inputs, memory, lambda x: np.concatenate([x[:, :30], -x[:, 30:]], axis=1))
    assert_close(
        outputs(later | {"controls": inputs["controls"], "weights": {}})[:, :30],
        whole[:, :30],
        1e-5,
    )
    inputs["value"][0, 9, 0] = np.nan
    gradient = jax.grad(lambda inputs: outputs(inputs)[:, 12:].sum())(inputs)
    broken = np.array(outputs(inputs))
    assert np.isnan(broken[0, 9:12, 0]).all()
    broken[0, 9:12, 0] = whole[0, 9:12, 0]
    assert_close(broken, whole, 1e-5)
    for x in jax.tree.leaves(gradient):  # other heads and rows, and the values of this one
        assert np.isfinite(x[1]).all()
        assert np.isfinite(x[0, :, 1]).all()
    assert np.isfinite(gradient["value"]).all()


@pytest.mark.slow
def test_layers_decode_as_they_train():
    layer = mc.nn.MemoryCaching(
        *(8, 2),
        memory=mc.memories.GatedDeltaNet(),
        aggregation=SSC,
        segmentation=mc.Constant(4),
        rngs=nnx.Rngs(0),
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 23, 8)), jnp.float32)
    cache, outputs = layer.init_cache(2, max_length=23), []
    for begin, end in ((0, 9), (9, 10), (10, 23)):
        y, cache = layer(x[:, begin:end], cache=cache)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), layer(x), atol=1e-5)
    with pytest.raises(ValueError, match="gates beside exact tokens depend on what memories"):
        layer.gates(x)


@pytest.mark.slow
def test_rows_return_to_a_segments_begin():
    """A stream that goes on from whole states finds them beside their tokens."""
    mixer = mc.nn.MemoryCachingMixer(
        memory=mc.memories.SSD(), aggregation=GRM, segmentation=CONSTANT, start="checkpoint"
    )
    config = mc.nn.LanguageModelConfig(17, 1, features=8, num_heads=2, mixers=(mixer,))
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 30)))
    hidden, cache = model.extend(tokens, model.init_cache(2, 30, keep_ends=True))
    cache = mc.rewind_to(model, cache, tokens, np.array([21, 11]))
    rest = jnp.stack([tokens[0, 21:29], tokens[1, 11:19]])
    again, _ = model.extend(rest, cache)
    np.testing.assert_allclose(again, np.stack([hidden[0, 21:29], hidden[1, 11:19]]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["pallas_tpu", "pallas_gpu"])
def test_kernels_write_and_read_the_states(kernels):
    memory = MEMORIES["gated_deltanet"]
    inputs = make_inputs(memory, 32, batch=1, heads=1, dim=8, dtype=np.float32)
    cases = tuple((kind, CONSTANT, "independent") for kind in (GRM, SSC))
    with interpret_kernels():
        assert_close(run(inputs, memory, cases, None, kernels), run(inputs, memory, cases), 1e-4)


@dataclasses.dataclass(frozen=True)
class Sigmoid(mc.GRM):
    """States and tokens that do not compete."""

    def gates(self, cached, live):
        return jax.nn.sigmoid(cached), jax.nn.sigmoid(live)


@dataclasses.dataclass(frozen=True)
class TwoHops(mc.GRM):
    """A second read with what the first one found; tokens are read once."""

    def needs(self, memory):
        return ("layers",)

    def read(self, bank, live, query, selection):
        again = query + super().read(bank, live, query, selection)
        return super().read(bank, dataclasses.replace(live, query=again), again, selection)

    def read_token(self, memory, states, query, gates):
        again = query + super().read_token(memory, states, query, gates)
        return super().read_token(memory, states, again, gates)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_aggregations_of_ones_own():
    memory = MEMORIES["linear"]
    inputs = make_inputs(memory, 30, dtype=np.float64)
    cases = tuple((kind(exact=2), CONSTANT, "independent") for kind in (Sigmoid, TwoHops))
    wanted = run(inputs, memory, cases, None, "reference")
    assert_close(run(inputs, memory, cases), wanted, 1e-12)
    for case, y in zip(cases, wanted, strict=True):
        (got,), _ = streamed(inputs, memory, case, ((0, 30),))
        assert_close(got, y, 1e-12)


def test_refusals():
    how: Any = dict(memory=mc.memories.SSD(), aggregation=mc.SSC(exact=5))
    for segmentation in (mc.Logarithmic(8), mc.Constant(4), mc.Lengths((8, 4)), mc.Adaptive(4, 8)):
        with pytest.raises(ValueError, match="exact=5 tokens beside each state need Constant"):
            mc.init_cache(1, 1, 4, 4, **how, segmentation=segmentation, max_length=12)
    refused: tuple[dict[str, Any], ...] = dict(policy="merge"), dict(placement="host")
    for options in refused:
        with pytest.raises(ValueError, match=r"exact tokens (stay|cannot be)"):
            mc.init_cache(1, 1, 4, 4, **how, segmentation=CONSTANT, max_segments=2, **options)
    # No mean of states stands for their tokens.
    how["aggregation"] = mc.GRM(gate="uniform", exact=1)
    cache = mc.init_cache(1, 1, 4, 4, **how, segmentation=CONSTANT, max_segments=3)
    assert cache.pooled.shape[2] == 3
