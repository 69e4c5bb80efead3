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
    MEMORIES,
    assert_close,
    make_inputs,
    value_and_vjp,
)

LENGTH = 37
SEGMENTATIONS = {
    "constant": mc.Constant(8),
    "logarithmic": mc.Logarithmic(4),
    "lengths": mc.Lengths((8, 16, 8, 8)),
}


def over_time(inputs, memory, change):
    """The tokens of inputs, changed; constants of a head as they are."""
    fixed = {name for name, control in memory.controls.items() if control.axes == "h"}

    def leaf(path, x):
        return x if path[-1].key in fixed else change(x)

    tokens = {name: x for name, x in inputs.items() if name != "weights"}
    return jax.tree_util.tree_map_with_path(leaf, tokens)


def empty(
    inputs, memory, aggregation, segmentation, start: Any = "independent", segments=None, **options
):
    batch, length, heads, dim = inputs["key"].shape
    if segments is None:
        segments = -(-length // segmentation.size) - 1
    return mc.init_cache(
        batch,
        heads,
        dim,
        dim,
        memory=memory,
        weights=inputs["weights"],
        aggregation=aggregation,
        segmentation=segmentation,
        start=start,
        max_segments=segments,
        dtype=inputs["key"].dtype,
        **options,
    )


def whole(inputs, memory, aggregation, segmentation, start: Any = "independent"):
    return mc.memory_caching(
        **inputs, memory=memory, aggregation=aggregation, segmentation=segmentation, start=start
    )


def streamed(inputs, memory, aggregation, segmentation, start="independent", split=(3, 33, 1)):
    """The outputs of calls with so many tokens each."""
    cache, outputs, begin = empty(inputs, memory, aggregation, segmentation, start), [], 0
    for count in split:
        part = over_time(inputs, memory, lambda x, b=begin, c=count: x[:, b : b + c])
        y, cache = mc.extend(cache, **part)
        outputs.append(y)
        begin += count
    return jnp.concatenate(outputs, axis=1)


@functools.partial(jax.jit, static_argnames=("memory", "cases"))
def both(inputs, memory, cases: Any) -> Any:
    """Streamed and at once, for (aggregation, segmentation, start) each."""
    runs: Any = (streamed, whole)
    return tuple(
        {
            case: run(inputs, memory, AGGREGATIONS[case[0]], SEGMENTATIONS[case[1]], case[2])
            for case in cases
        }
        for run in runs
    )


@functools.partial(jax.jit, static_argnames=("memory", "kind", "segmentation"))
def runs(inputs, memory, kind, segmentation) -> Any:
    """Streamed and at once."""
    return tuple(run(inputs, memory, kind, segmentation) for run in (streamed, whole))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    [("ssc", "constant", "checkpoint"), ("grm", "logarithmic", "independent")],
    ids="-".join,
)
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_every_rule(memory, case):
    got, wanted = both(make_inputs(memory, LENGTH), memory, (case,))
    assert_close(got, wanted, 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    [
        ("residual", "logarithmic", "checkpoint"),
        ("soup", "constant", "independent"),
        ("soup", "lengths", "checkpoint"),
        ("ssc", "lengths", "independent"),
        ("ssc", "logarithmic", "independent"),
    ],
    ids="-".join,
)
def test_every_aggregation(case):
    memory = MEMORIES["titans"]
    got, wanted = both(make_inputs(memory, LENGTH), memory, (case,))
    assert_close(got, wanted, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_16384_tokens(kind):
    memory, segmentation, kind = MEMORIES["titans"], mc.Constant(512), AGGREGATIONS[kind]
    sizes: dict[str, Any] = dict(batch=1, heads=1, dim=8, dtype=jnp.float32)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 1 << 14, **sizes))
    wanted = jax.jit(lambda inputs: whole(inputs, memory, kind, segmentation))(inputs)
    step = jax.jit(mc.extend, donate_argnums=0)
    cache, outputs = empty(inputs, memory, kind, segmentation), []
    pieces = [*range(0, 1 << 14, 3000), 1 << 14]
    for begin, end in itertools.pairwise(pieces):
        part = over_time(inputs, memory, lambda x, b=begin, e=end: x[:, b:e])
        y, cache = step(cache, **part)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), wanted, 1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gate", ["position", "uniform"])
def test_other_gates(gate):
    memory, kind = MEMORIES["linear"], mc.GRM(gate=gate, pooling="sum")
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, LENGTH))
    segmentation = SEGMENTATIONS["lengths" if gate == "uniform" else "constant"]
    got, wanted = runs(inputs, memory, kind, segmentation)
    assert_close(got, wanted, 1e-10)


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

    def outputs(run):
        return value_and_vjp(lambda inputs: run(inputs, memory, mc.GRM(), mc.Constant(8)), inputs)

    split = functools.partial(streamed, split=(3, 18) if memory.depth > 1 else (3, 17, 1))
    assert_close(outputs(split), outputs(whole), 1e-9, scale=1.0)


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
    with pytest.raises(ValueError, match="nothing is to be read"):
        mc.extend(cache, **over_time(inputs, memory, lambda x: x[:, :0]))
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
        "give max_segments or max_length": dict(max_length=10, max_segments=2),
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
    got, wanted = runs(inputs, memory, kind, mc.Constant(4))
    assert_close(got, wanted, 1e-10)


@pytest.mark.parametrize(
    ("name", "kind"), [("linear", mc.GRM()), ("titans", mc.SSC(top_k=2))], ids=["grm", "ssc"]
)
def test_narrow_states(name, kind):
    memory = MEMORIES[name]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, LENGTH, dim=16, dtype=jnp.float32))
    wanted, step = whole(inputs, memory, kind, mc.Constant(8)), jax.jit(mc.extend)
    nbytes, errors = [], []
    for dtype in ("float32", "bfloat16", "int8"):
        cache = empty(inputs, memory, kind, mc.Constant(8), cache_dtype=dtype)
        nbytes.append(sum(x.nbytes for x in jax.tree.leaves(cache.bank)))
        y, cache = step(cache, **over_time(inputs, memory, lambda x: x[:, :36]))
        last, _ = step(cache, **over_time(inputs, memory, lambda x: x[:, 36:]))
        difference = jnp.concatenate([y, last], axis=1) - wanted
        errors.append(float(jnp.linalg.norm(difference) / jnp.linalg.norm(wanted)))
    assert nbytes[1] == nbytes[0] / 2
    assert nbytes[2] < nbytes[0] / 3
    assert errors[0] < 1e-5 < errors[1] < 4e-3
    assert errors[2] < 8e-3
