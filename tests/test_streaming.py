"""Streams: any split of a sequence gives the outputs of one pass over the whole."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import (
    AGGREGATIONS,
    FAMILIES,
    KINDS,
    MEMORIES,
    SEGMENTATIONS,
    assert_close,
    combine,
    each_once,
    make_inputs,
    run_all,
    scheduled,
    value_and_vjp,
)
from tests.streams import empty, over_time, streamed
from tests.vectors import RULES, SEGMENT, assert_agrees, vector_inputs

LENGTH = 37


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def whole(inputs, memory, aggregation, segmentation, start: Any = "independent"):
    with scheduled("in_turn"):
        return mc.memory_caching(
            **inputs, memory=memory, aggregation=aggregation, segmentation=segmentation, start=start
        )


@functools.partial(jax.jit, static_argnames=("memory", "cases", "count"))
def streamed_all(inputs, memory, cases, count):
    """All cases in one program, in calls of ``count`` tokens; what is left at the end is not."""
    calls = inputs["key"].shape[1] // count
    tokens = over_time(inputs, memory, lambda x: x[:, : calls * count])
    outputs = {}
    for name, kind, segmentation, start in cases:

        def call(cache, begin):
            part = over_time(
                tokens, memory, lambda x: jax.lax.dynamic_slice_in_dim(x, begin, count, axis=1)
            )
            y, cache = mc.extend(cache, **part)
            return cache, y

        with scheduled("in_turn"):
            cache = empty(inputs, memory, kind, segmentation, start)
            _, y = jax.lax.scan(call, cache, count * jnp.arange(calls))
        outputs[name] = jnp.concatenate(list(y), axis=1)
    return outputs


def named(cases):
    """Cases of ``run_all`` for ``streamed_all``."""
    return tuple(
        ("/".join(case), KINDS[case[0]], SEGMENTATIONS[case[1]](SEGMENT), case[2]) for case in cases
    )


@pytest.mark.usefixtures("x64")
class TestEveryRule:
    """Streams of every rule, against tests/vectors.py where it has the outputs."""

    @pytest.mark.parametrize("rule", MEMORIES)
    def test_token_by_token(self, rule):
        """Every aggregation, segmentation and start."""
        self.compare(rule, combine(KINDS), count=1)

    @pytest.mark.parametrize("rule", MEMORIES)
    def test_in_pieces(self, rule):
        """Calls that end within segments and chunks, over borders of both."""
        shift = list(MEMORIES).index(rule)
        self.compare(rule, each_once(shift, KINDS), count=7)

    def compare(self, rule, cases, count):
        if rule in RULES:
            memory, inputs = vector_inputs(rule)
        else:
            memory, inputs = MEMORIES[rule], make_inputs(MEMORIES[rule], 22, batch=1, heads=1)
        outputs = streamed_all(inputs, memory, named(cases), count)
        assert len(outputs) == len(cases)
        known = [c for c in cases if rule in RULES and (c[0] != "ssc_soup" or memory.depth == 1)]
        for case in known:
            name = "/".join(("ssc" if case[0] == "ssc_soup" else case[0], *case[1:]))
            assert_agrees(rule, name, outputs.pop("/".join(case)))
        if outputs:
            others = tuple(case for case in cases if case not in known)
            wanted = run_all(inputs, memory, cases=others)
            for name, y in outputs.items():
                assert_close(y, wanted[name][:, : y.shape[1]], 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["linear", "titans"])
def test_other_gates_and_segments(name):
    memory = MEMORIES[name]
    inputs = make_inputs(memory, 29, batch=1, heads=1)
    lengths = mc.Lengths((4, 12, 4, 4, 8))
    plans: tuple = (
        (mc.GRM(gate="position"), mc.Constant(4), "checkpoint"),
        (mc.SSC(gate="position", top_k=2), lengths, "independent"),
        (mc.GRM(gate="uniform"), lengths, "checkpoint"),
        (mc.Soup(gate="uniform"), mc.Logarithmic(4), "checkpoint"),
        (mc.GRM(pooling="sum"), mc.Logarithmic(4), "independent"),
        (mc.SSC(pooling="sum", top_k=2, inner="soup"), lengths, "checkpoint"),
        (mc.Soup(), lengths, "independent"),
        (mc.Residual(), lengths, "independent"),
    )
    # What is read does not depend on the rule; mixtures differ from reads where a rule is deep.
    plans = tuple(plan for plan in plans if name == "linear" or plan[0].mixes)
    cases = tuple((repr(plan), *plan) for plan in plans)
    got = streamed_all(inputs, memory, cases, 7)
    for name, *plan in cases:
        assert_close(got[name], whole(inputs, memory, *plan)[:, :28], 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_16384_tokens(kind):
    memory, segmentation, kind = MEMORIES["titans"], mc.Constant(512), AGGREGATIONS[kind]
    sizes: dict[str, Any] = dict(batch=1, heads=1, dim=8, dtype=jnp.float32)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 1 << 14, **sizes))
    wanted = whole(inputs, memory, kind, segmentation)
    step = jax.jit(mc.extend, donate_argnums=0)
    cache, outputs = empty(inputs, memory, kind, segmentation), []
    for begin, end in itertools.pairwise([0, 5461, 2 * 5461, 3 * 5461, 1 << 14]):
        part = over_time(inputs, memory, lambda x, b=begin, e=end: x[:, b:e])
        y, cache = step(cache, **part)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), wanted, 1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", FAMILIES.values(), ids=FAMILIES)
def test_rows_at_positions_of_their_own(memory):
    kind, segmentation = mc.GRM(), mc.Constant(8)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, LENGTH, batch=3))
    wanted = np.asarray(whole(inputs, memory, kind, segmentation))
    step = jax.jit(mc.extend)
    cache = empty(inputs, memory, kind, segmentation)
    inputs = jax.tree.map(np.asarray, inputs)
    position = np.zeros(3, int)
    for lengths in ([5, 13, 1], [0, 13, 9], [11, 2, 13], [13, 9, 0]):
        there = position[:, None] + np.arange(13)[None]
        part = over_time(
            inputs,
            memory,
            lambda x, t=there: np.take_along_axis(
                x, np.minimum(t, LENGTH - 1).reshape(3, 13, *[1] * (x.ndim - 2)), axis=1
            ),
        )
        y, cache = step(cache, **part, lengths=np.asarray(lengths))
        for row, count in enumerate(lengths):
            known = wanted[row, position[row] : position[row] + count]
            assert_close(y[row, :count], known, 1e-10, scale=1.0)
            np.testing.assert_array_equal(y[row, count:], 0.0)
        position += lengths
        np.testing.assert_array_equal(cache.position, position)

    # One row anew, the others in another order.
    cache = cache.reset(np.array([False, True, False])).take(np.array([1, 0]))
    part = over_time(inputs, memory, lambda x: np.stack([x[1, :4], x[0, 29:33]]))
    y, _ = step(cache, **part)
    assert_close(y, np.stack([wanted[1, :4], wanted[0, 29:33]]), 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", [FAMILIES["linear"], FAMILIES["titans"]], ids=repr)
def test_gradients_pass_from_call_to_call(memory):
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 21, batch=1, heads=1))

    plan: Any = (mc.GRM(), mc.Constant(8))

    def in_pieces(inputs):
        return streamed_all(inputs, memory, (("grm", *plan, "independent"),), 7)["grm"]

    with scheduled("in_turn"):
        got = value_and_vjp(in_pieces, inputs)
        wanted = value_and_vjp(lambda inputs: whole(inputs, memory, *plan), inputs)
    assert_close(got, wanted, 1e-9, scale=1.0)


@pytest.mark.usefixtures("x64")
def test_segments_begin_with_the_weights_that_are_given():
    memory, plan = MEMORIES["titans"], (mc.Residual(), mc.Constant(8))
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 16, batch=1, heads=1))
    other = jax.tree.map(lambda w: w[:, ::-1], inputs["weights"])
    first, second = (over_time(inputs, memory, lambda x, p=p: x[:, p]) for p in np.s_[:8, 8:])
    _, cache = mc.extend(empty(inputs, memory, *plan), **first)

    @jax.jit
    def outputs(weights):
        return mc.extend(cache, **second, weights=weights)[0]

    alone = (whole(dict(second, weights=w), memory, *plan) for w in (inputs["weights"], other))
    kept = [outputs(w) - y for w, y in zip((inputs["weights"], other), alone, strict=True)]
    assert_close(kept[1], kept[0], 1e-10)  # the read of the first segment, which is cached

    def loss(weights):
        return (outputs(weights) ** 2).sum()

    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(loss)(other), other)))
    up, down = (loss(jax.tree.map(lambda w, s=s: s * w, other)) for s in (1 + 1e-6, 1 - 1e-6))
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("memory", "segmentation"),
    [
        (mc.memories.LinearAttention(), mc.Constant(1)),
        (mc.memories.Titans(chunk_size=1, expansion=1), mc.Constant(2)),
    ],
    ids=["segments of one", "chunks of one"],
)
def test_chunks_of_one_token(memory, segmentation):
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 6))
    cache = empty(inputs, memory, mc.GRM(), segmentation)
    got, _ = jax.jit(mc.extend)(cache, **over_time(inputs, memory, lambda x: x))
    assert_close(got, whole(inputs, memory, mc.GRM(), segmentation), 1e-10)


@pytest.mark.usefixtures("x64")
def test_rows_that_are_full():
    memory = MEMORIES["linear"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 27))
    cache = mc.init_cache(
        *(2, 3, 4, 4),
        memory=memory,
        aggregation=mc.GRM(),
        segmentation=mc.Constant(8),
        max_length=20,
        dtype=jnp.float64,
    )
    step = jax.jit(mc.extend)
    _, cache = step(cache, **over_time(inputs, memory, lambda x: x[:, :16]))
    y, cache = step(cache, **over_time(inputs, memory, lambda x: x[:, 16:]))
    assert_close(y[:, :4], whole(inputs, memory, mc.GRM(), mc.Constant(8))[:, 16:20], 1e-10)
    assert jnp.isnan(y[:, 4:]).all()
    y, _ = step(cache, **over_time(inputs, memory, lambda x: x[:, :1]))
    assert jnp.isnan(y).all()


@pytest.mark.parametrize("kind", [mc.GRM(), mc.SSC(top_k=1)], ids=["grm", "ssc"])
def test_a_row_that_begins_anew_forgets_what_is_not_a_number(kind):
    memory = MEMORIES["linear"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 20, dtype=jnp.float32))
    cache, step = empty(inputs, memory, kind, mc.Constant(4)), jax.jit(mc.extend, donate_argnums=0)
    broken = over_time(inputs, memory, lambda x: x.at[0].set(jnp.nan))
    _, cache = step(cache, **broken)
    cache = cache.reset(np.array([True, True]))
    kept = cache.take(np.array([1, 0]))  # which the next step leaves alone
    y, _ = step(cache, **over_time(inputs, memory, lambda x: x))
    assert_close(y, whole(inputs, memory, kind, mc.Constant(4)), 1e-5)
    y, _ = step(kept, **over_time(inputs, memory, lambda x: x[::-1]))
    assert jnp.isfinite(y).all()


def test_of_equally_relevant_states_the_older_is_read():
    memory = MEMORIES["linear"]
    cache = mc.init_cache(
        *(1, 1, 1, 1),
        memory=memory,
        aggregation=mc.SSC(gate="uniform", top_k=1),
        segmentation=mc.Constant(1),
        max_segments=2,
        policy="drop_oldest",
    )
    one, step = jnp.ones((1, 1, 1, 1)), jax.jit(mc.extend)
    outputs = []
    for t in range(5):
        y, cache = step(cache, one, one, one * 10.0**t)
        outputs.append(y.item())
    # Of the segments 2 and 3, which are kept, and the live one, 4.
    np.testing.assert_allclose(outputs[-1], (1e2 + 1e4) / 2, rtol=1e-6)


def test_a_step_costs_the_same_however_many_segments_are_cached():
    from experiments._flops import count_flops

    memory, kind = MEMORIES["titans"], mc.SSC(top_k=2)
    inputs = make_inputs(memory, 1, batch=1, heads=1, dtype=jnp.float32)
    inputs = jax.tree.map(jnp.asarray, inputs)
    part = over_time(inputs, memory, lambda x: x)

    def flops(segments):
        cache = empty(inputs, memory, kind, mc.Constant(8), segments=segments)
        return count_flops(lambda cache: mc.extend(cache, **part), cache)

    assert flops(64) - flops(32) <= 1.1 * 2 * 4 * 32  # the router's own, of 32 more pooled keys


def test_logarithmic_caches_keep_log_n_states():
    inputs = jax.tree.map(jnp.asarray, make_inputs(MEMORIES["linear"], 1))
    cache = empty(inputs, MEMORIES["linear"], mc.GRM(), mc.Logarithmic(4), segments=1000)
    assert cache.pooled.shape[2] == 9  # no number up to 1000 has more ones in base 2
    assert cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))


@pytest.mark.usefixtures("unchecked")
def test_errors():
    memory = MEMORIES["linear"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 20))
    part = over_time(inputs, memory, lambda x: x)
    cache = empty(inputs, memory, mc.GRM(), mc.Constant(8), segments=1)
    with pytest.raises(ValueError, match="holds 16 tokens in a row and would have 20"):
        mc.extend(cache, **part)
    y, after = mc.extend(cache, **over_time(inputs, memory, lambda x: x[:, :16]))
    assert_close(y, whole(inputs, memory, mc.GRM(), mc.Constant(8))[:, :16], 1e-5)
    with pytest.raises(ValueError, match="would have 17"):
        mc.extend(after, **over_time(inputs, memory, lambda x: x[:, :1]))
    beyond, _ = jax.jit(mc.extend)(after, **over_time(inputs, memory, lambda x: x[:, :1]))
    assert jnp.isnan(beyond).all()
    with pytest.raises(ValueError, match="the cache has 2 rows, got tokens of 1"):
        mc.extend(cache, **over_time(inputs, memory, lambda x: x[:1]))
    with pytest.raises(ValueError, match=r"h, k of the cache\) = \(2, 20, 3, 4\), got .* 2, 4\)"):
        mc.extend(cache, **over_time(inputs, memory, lambda x: x[:, :, :2]))
    with pytest.raises(ValueError, match=r"h, v of the cache\) = \(2, 20, 3, 4\), got .* 3, 3\)"):
        mc.extend(cache, **(part | dict(value=part["value"][..., :3])))
    with pytest.raises(ValueError, match=r"the cache has the rows 0 to 1, got \[2\]"):
        cache.take(np.array([2]))
    with pytest.raises(ValueError, match="lengths must be 0 to 20, the tokens given, got"):
        mc.extend(cache, **part, lengths=jnp.array([3, 21]))
    with pytest.raises(ValueError, match="key must not be empty"):
        mc.extend(cache, **over_time(inputs, memory, lambda x: x[:, :0]))
    titans, few = MEMORIES["titans"], over_time(inputs, memory, lambda x: x[:, :3])
    others: Any = (
        ("memory", titans, r"memory=LinearAttention\(\), got Titans\(chunk_size=4"),
        ("aggregation", mc.SSC(), r"aggregation=GRM\(gate='content', .*, got SSC"),
        ("segmentation", mc.Constant(16), r"segmentation=Constant\(size=8\), got .*16"),
        ("start", "checkpoint", "start='independent', got 'checkpoint'"),
        ("weights", dict(W=jnp.zeros((3, 4, 4))), r"weights of LinearAttention must be empty; unk"),
    )
    for name, wrong, message in others:
        with pytest.raises(ValueError, match=message):
            mc.extend(cache, **few, **{name: wrong})
    same: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(8), weights={})
    got, _ = mc.extend(cache, **few, **same, start="independent")  # none of it took the cache
    assert_close(got, y[:, :3], 1e-6)
    with pytest.raises(ValueError, match=r"lengths must be integers \(b,\) = \(2,\), got"):
        mc.extend(cache, **part, lengths=jnp.zeros(3, int))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("message", "options"),
    {
        "max_segments is too small for policy='error', got -1": dict(max_segments=-1),
        "policy='merge' is for segments of one size": dict(
            segmentation=mc.Logarithmic(8), policy="merge", max_segments=4
        ),
        "policy='merge' needs max_segments": dict(policy="merge"),
        "policy must be one of": dict(policy="forget"),
        "placement='host' is for SSC": dict(placement="host", max_segments=2),
        "placement must be one of": dict(placement="disk", max_segments=2),
        "^dtype must be one of": dict(dtype=jnp.bfloat16, max_segments=2),
        "cache_dtype must be one of": dict(cache_dtype="int4", max_segments=2),
        "max_length must be at least 1": dict(max_length=0),
        "give max_segments or max_length, got neither": {},
    }.items(),
)
def test_caches_that_are_none(message, options):
    options = dict(aggregation=mc.GRM(), segmentation=mc.Constant(8)) | options
    with pytest.raises(ValueError, match=message):
        mc.init_cache(1, 2, 4, 4, memory=mc.memories.LinearAttention(), **options)


def kept_by_hand(inputs, size, most, policy):
    """Linear attention with GRM, one row and head, in NumPy: the outputs under a policy."""
    query, key, value, connector = (
        np.asarray(inputs[name])[0, :, 0] for name in ("query", "key", "value", "connector")
    )
    cached, state, keys, outputs = [], 0, 0, []
    for t in range(len(key)):
        state, keys = state + np.outer(value[t], key[t]), keys + key[t]
        pooled = [*(c["pooled"] for c in cached), keys / (t % size + 1)]
        counts = [*(c["count"] for c in cached), 1]
        weights = counts * np.exp(np.stack(pooled) @ connector[t])
        weights /= weights.sum()
        states = [*(c["state"] for c in cached), state]
        outputs.append(sum(w * m @ query[t] for w, m in zip(weights, states, strict=True)))
        for c, weight in zip(cached, weights, strict=False):
            c["gates"] += weight
        if (t + 1) % size:
            continue
        new = dict(state=state, pooled=keys / size, count=1, gates=0.0, newest=t // size)
        cached, state, keys = [*cached, new], 0, 0
        if len(cached) <= most:
            continue
        if policy == "drop_oldest":
            cached = cached[1:]
        elif policy == "drop_least_read":
            mean = [c["gates"] / (t // size - c["newest"]) for c in cached[:-1]]
            del cached[int(np.argmin(mean))]
        else:
            i = int(np.argmin([a["count"] + b["count"] for a, b in itertools.pairwise(cached)]))
            one, two = cached[i : i + 2]
            total = one["count"] + two["count"]
            mixed = {
                name: (one["count"] * one[name] + two["count"] * two[name]) / total
                for name in ("state", "pooled")
            }
            cached[i : i + 2] = [dict(two, count=total, **mixed)]
    return np.stack(outputs)[None, :, None]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("policy", ["drop_oldest", "drop_least_read", "merge"])
def test_bounded_memory(policy, most):
    memory = MEMORIES["linear"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 50, batch=1, heads=1))
    cache = empty(inputs, memory, mc.GRM(), mc.Constant(4), segments=most, policy=policy)
    outputs, step = [], jax.jit(mc.extend)
    for begin in range(0, 50, 10):
        y, cache = step(cache, **over_time(inputs, memory, lambda x, b=begin: x[:, b : b + 10]))
        outputs.append(y)
    assert cache.pooled.shape[2] == most
    assert_close(np.concatenate(outputs, axis=1), kept_by_hand(inputs, 4, most, policy), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("titans", mc.Soup(gate="uniform")), ("linear", mc.Residual())],
    ids=["soup", "residual"],
)
def test_a_running_mean_is_all_that_uniform_gates_need(name, kind):
    memory = MEMORIES[name]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, LENGTH))
    assert empty(inputs, memory, kind, mc.Constant(4)).pooled.shape[2] == 1
    got, wanted = (run(inputs, memory, kind, mc.Constant(4)) for run in (streamed, whole))
    assert_close(got, wanted, 1e-10)


@pytest.mark.parametrize(
    ("name", "kind"), [("linear", mc.GRM()), ("titans", mc.SSC(top_k=2))], ids=["grm", "ssc"]
)
def test_narrow_states(name, kind):
    memory = MEMORIES[name]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 36, dim=16, dtype=jnp.float32))
    wanted, step = whole(inputs, memory, kind, mc.Constant(8)), jax.jit(mc.extend)
    nbytes, errors = [], []
    for dtype in ("float32", "bfloat16", "int8"):
        cache = empty(inputs, memory, kind, mc.Constant(8), cache_dtype=dtype)
        nbytes.append(sum(x.nbytes for x in jax.tree.leaves(cache.bank)))
        outputs = []
        for begin in range(0, 36, 3):  # less than a chunk: one loop to compile
            part = over_time(inputs, memory, lambda x, b=begin: x[:, b : b + 3])
            y, cache = step(cache, **part)
            outputs.append(y)
        difference = np.concatenate(outputs, axis=1) - wanted
        errors.append(float(np.linalg.norm(difference) / np.linalg.norm(wanted)))
    assert nbytes[1] == nbytes[0] / 2
    assert nbytes[2] < nbytes[0] / 3
    assert errors[0] < 1e-5 < errors[1] < 4e-3
    assert errors[2] < 8e-3
