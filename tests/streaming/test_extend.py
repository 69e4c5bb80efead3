"""A stream's next tokens: initial weights, full rows, their cost, their errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, assert_close, make_inputs
from tests.covers import first_kept, kept_of
from tests.streams import empty, over_time, whole


@pytest.mark.slow
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
    first_kept(
        1,
        {
            "chunks of one": (mc.memories.Titans(chunk_size=1, expansion=1), mc.Constant(2)),
            "segments of one": (mc.memories.LinearAttention(), mc.Constant(1)),
        },
    ),
)
def test_chunks_of_one_token(memory, segmentation):
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 6))
    cache = empty(inputs, memory, mc.GRM(), segmentation)
    got, _ = jax.jit(mc.extend)(cache, **over_time(inputs, memory, lambda x: x))
    assert_close(got, whole(inputs, memory, mc.GRM(), segmentation), 1e-10)


@pytest.mark.slow
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


def test_traced_lengths_count_no_more_tokens_than_there_are():
    memory = MEMORIES["linear"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 3, dtype=jnp.float32))
    cache = empty(inputs, memory, mc.GRM(), mc.Constant(8))
    y, after = jax.jit(mc.extend)(cache, **inputs, lengths=jnp.array([2_000_000, 2]))
    assert after.position.tolist() == [3, 2]
    wanted, _ = mc.extend(cache, **inputs)
    np.testing.assert_array_equal(y[0], wanted[0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("memory", kept_of(["linear", "titans"], "titans"))
def test_rows_end_where_positions_do(memory):
    memory, plan = MEMORIES[memory], (mc.GRM(), mc.Constant(8))
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 20))
    cache = empty(inputs, memory, *plan, segments=2, policy="drop_oldest")
    last = cache.replace(position=jnp.array([2**31 - 16, 0], jnp.int32))  # a segment begins
    wanted, step = whole(inputs, memory, *plan), jax.jit(mc.extend)
    part = over_time(inputs, memory, lambda x: x)
    with pytest.raises(ValueError, match="most 2147483647 tokens and would have 2147483652: reset"):
        mc.extend(last, **part)
    y, ended = step(last, **part)
    assert_close(y[0, :15], wanted[0, :15], 1e-5)
    assert jnp.isnan(y[0, 15:]).all()
    assert_close(y[1], wanted[1], 1e-5)
    again, ended = step(ended, **part)
    assert jnp.isnan(again[0]).all()
    assert not jnp.isnan(again[1]).any()
    assert_close(step(ended.reset(jnp.array([True, True])), **part)[0], wanted, 1e-5)
    with pytest.raises(ValueError, match="max_length must be at most 2147483647, got 2147483648"):
        empty(inputs, memory, *plan, max_length=2**31)


@pytest.mark.slow
def test_gradients_do_not_depend_on_tokens_that_do_not_count():
    memory, lengths = mc.memories.Titans(chunk_size=4, depth=1), jnp.array([3, 6])
    inputs = make_inputs(memory, 6, heads=1, dim=2)
    weights = jax.tree.map(jnp.asarray, inputs.pop("weights"))
    rule: dict[str, Any] = dict(memory=memory, aggregation=mc.Residual())
    counts = np.arange(6)[None] < lengths[:, None]

    @jax.jit
    @jax.grad
    def gradient(inputs, other):
        def padded(x):
            return jnp.where(counts.reshape(2, 6, *[1] * (x.ndim - 2)), x, other)

        cache = mc.init_cache(
            *(2, 1, 2, 2), weights=weights, **rule, segmentation=mc.Constant(8), max_length=8
        )
        return mc.extend(cache, **jax.tree.map(padded, inputs), lengths=lengths)[0].sum()

    jax.tree.map(np.testing.assert_array_equal, gradient(inputs, np.nan), gradient(inputs, 0.0))


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


@pytest.mark.slow
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
