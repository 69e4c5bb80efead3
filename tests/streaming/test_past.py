"""Going back by tokens: a cache is what it was, bit for bit, and goes on as if they never came."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, make_inputs
from tests.covers import rules
from tests.streams import empty, over_time

LENGTH, REWIND = 22, 5  # more than a segment of 4: the tokens taken back may end two
FEW: dict[str, Any] = {
    "soup/logarithmic": dict(aggregation=mc.Soup(), segmentation=mc.Logarithmic(4)),
    "merge": dict(policy="merge", segments=2),
}
# Every other aggregation, segmentation, start, bound, dtype and place: a rule has no part in them.
OTHERS: dict[str, Any] = {
    "grm/constant": dict(start="checkpoint"),
    "residual/lengths": dict(
        aggregation=mc.Residual(), segmentation=mc.Lengths((4, 8, 4, 8)), start="checkpoint"
    ),
    "ssc/logarithmic": dict(
        aggregation=mc.SSC(top_k=2), segmentation=mc.Logarithmic(4), start="checkpoint"
    ),
    "running mean": dict(aggregation=mc.GRM(gate="uniform"), segmentation=mc.Constant(4)),
    "drop_oldest": dict(policy="drop_oldest", segments=1, cache_dtype="int8"),
    "drop_least_read": dict(policy="drop_least_read", segments=2, cache_dtype="bfloat16"),
    "compose_by_age": dict(policy="compose_by_age", segments=2, cache_dtype="int8"),
    "host": dict(aggregation=mc.SSC(top_k=1), policy="drop_oldest", segments=2, placement="host"),
}


def made_of(inputs, memory, kinds):
    made = {}
    for name, options in kinds.items():
        options = dict(aggregation=mc.GRM(), segmentation=mc.Constant(4)) | options
        planned = not isinstance(options["segmentation"], mc.Constant)
        bound = dict(max_length=LENGTH) if planned else {}
        options = dict(segments=None if planned else 6) | options
        made[name] = without_none(inputs, memory, **options, **bound, rewind=REWIND)
    return made


def without_none(inputs, memory, aggregation, segmentation, segments, **options):
    if segments is not None:
        return empty(inputs, memory, aggregation, segmentation, segments=segments, **options)
    batch, _, heads, key_dim = inputs["key"].shape
    return mc.init_cache(
        *(batch, heads, key_dim, inputs["value"].shape[-1]),
        memory=memory,
        weights=inputs["weights"],
        aggregation=aggregation,
        segmentation=segmentation,
        **options,
    )


@jax.jit
def extend_all(caches, part, lengths):
    done = {name: mc.extend(cache, **part, lengths=lengths) for name, cache in caches.items()}
    return {name: y for name, (y, _) in done.items()}, {name: c for name, (_, c) in done.items()}


@jax.jit
def rewind_all(caches, tokens):
    return {name: cache.rewind(tokens) for name, cache in caches.items()}


def read_later(cache):
    """What later tokens read of a cache; on the host, without the slot for states that go."""
    bank = jax.tree.map(np.asarray, cache.bank)
    if cache.config.placement == "host":
        split = len(cache.position), -1, cache.sizes[0]
        bank = jax.tree.map(lambda x: x.reshape(*split, *x.shape[1:])[:, :-1], bank)
    cache = cache.replace(bank=bank, past=None, rewindable=None, initial=None)
    if cache.pending is None:
        return cache
    state = cache.state
    if cache.config.start == "independent":  # the next token resets it
        ended = np.asarray(cache.position) % cache.config.segmentation.size == 0
        state = jax.tree.map(
            lambda x: np.where(ended.reshape(-1, *[1] * (x.ndim - 1)), 0, x), state
        )
    return cache.replace(state=state, pending=pending_tokens(cache))


def pending_tokens(cache):
    """The tokens of chunks that have begun; what is left of earlier ones is not read."""
    taken = np.asarray(cache.position)[:, None] % cache.config.memory.gradient_chunk
    begun = np.arange(cache.config.memory.gradient_chunk)[None] < taken

    def of(x, axis):
        shape = [len(x), *[1] * (x.ndim - 1)]
        shape[axis] = -1 if axis else shape[0]
        marks = begun if axis else taken[:, 0] > 0
        return np.where(marks.reshape(shape), x, 0)

    inputs, deltas = (
        [of(x, axis) for x in rows]
        for rows, axis in ((cache.pending.inputs, 4), (cache.pending.deltas, 3))
    )
    shares = jax.tree.map(lambda x: of(x, 0), (cache.pending.weights, cache.pending.momentum))
    return inputs, deltas, shares


def assert_same(got, wanted, rows=(0, 1, 2)):
    for name, cache in wanted.items():
        leaves = jax.tree_util.tree_leaves_with_path(read_later(cache))
        for (path, x), y in zip(leaves, jax.tree.leaves(read_later(got[name])), strict=True):
            message = f"{name}{jax.tree_util.keystr(path)}"
            np.testing.assert_array_equal(y[np.array(rows)], x[np.array(rows)], message)


def go_back(rule, kinds):
    memory = MEMORIES[rule]
    inputs = make_inputs(memory, LENGTH, batch=3, heads=2, dtype=np.float32)
    inputs = jax.tree.map(jnp.asarray, inputs)

    def tokens(begin):
        return over_time(inputs, memory, lambda x: x[:, begin : begin + 11])

    # Row 0 is in the middle of a segment, row 1 at its end, row 2 is empty.
    _, before = extend_all(made_of(inputs, memory, kinds), tokens(0), jnp.array([11, 8, 0]))
    few, many = jnp.array([0, 1, 2]), jnp.array([5, 3, 6])
    spoilt = over_time(inputs, memory, lambda x: x[:, 11:].at[:, 3:].set(jnp.nan))
    _, wanted = extend_all(before, spoilt, few)
    _, after = extend_all(before, spoilt, many)
    got = rewind_all(after, many - few)
    assert_same(got, wanted)
    assert next(iter(got.values())).rewindable.tolist() == [0, 3, 1]
    # And they go on alike, over ends of segments, and back again.
    outputs, then = extend_all(got, tokens(3), jnp.full(3, 7))
    for name, y in extend_all(wanted, tokens(3), jnp.full(3, 7))[0].items():
        np.testing.assert_array_equal(outputs[name], y, name)
    _, two = extend_all(got, tokens(3), jnp.full(3, 2))
    assert_same(rewind_all(then, jnp.full(3, 5)), two)


@pytest.mark.parametrize("rule", rules(0))
def test_every_rule(rule):
    go_back(rule, FEW)


@pytest.mark.slow
def test_every_other_cache():
    go_back("ssd", OTHERS)


@pytest.mark.parametrize("segment", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_whole_chunks_leave_the_last_tokens(segment):
    """Calls of whole chunks, and none at once after them: the last tokens came one by one."""
    memory = mc.memories.Titans(chunk_size=min(4, segment), expansion=1)
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 31, heads=1, dtype=np.float32))
    step, cache = (
        jax.jit(mc.extend),
        empty(inputs, memory, mc.GRM(), mc.Constant(segment), rewind=3),
    )
    whole = over_time(inputs, memory, lambda x: x[:, :23])
    wanted, cache = step(cache, **whole)
    assert cache.rewindable.tolist() == [3, 3]
    cache = cache.rewind(np.array([3, 1]))
    again = over_time(inputs, memory, lambda x: jnp.stack([x[0, 20:23], x[1, 22:25]]))
    y, _ = step(cache, **again)
    np.testing.assert_allclose(y[0], wanted[0, 20:], rtol=0, atol=1e-6)
    np.testing.assert_allclose(y[1, 0], wanted[1, 22], rtol=0, atol=1e-6)


def test_too_many_tokens():
    memory = MEMORIES["linear"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 9, heads=1, dtype=np.float32))
    part = over_time(inputs, memory, lambda x: x[:, :4])
    _, cache = mc.extend(empty(inputs, memory, mc.GRM(), mc.Constant(4), rewind=2), **part)
    for tokens, message in {
        (3, 0): r"at most \[2, 2\] tokens, got \[3, 0\]: init_cache\(..., rewind=\) keeps more",
        (-1, 0): r"at most \[2, 2\] tokens, got \[-1, 0\]",
        (1,): r"= \(2,\), or one for all rows, got int64 \(1,\)",
        (0.5, 1): r"= \(2,\), or one for all rows, got float64",
    }.items():
        with pytest.raises(ValueError, match=message):
            cache.rewind(np.array(tokens))
    assert cache.rewind(2).position.tolist() == cache.rewind(np.array([2, 2])).position.tolist()
    step = jax.jit(mc.extend)
    y, _ = step(cache, **part)  # which is as good as before
    assert jnp.isfinite(y).all()
    # Where they are not known: NaN in that row until it is reset.
    lost = jax.jit(lambda cache, tokens: cache.rewind(tokens))(cache, jnp.array([3, 2]))
    y, lost = step(lost, **part)
    assert jnp.isnan(y[0]).all()
    assert jnp.isfinite(y[1]).all()
    y, _ = step(lost.reset(np.array([True, False])), **part)
    assert jnp.isfinite(y).all()
    with pytest.raises(ValueError, match=r"does not go back: make it with init_cache\(..., rewind"):
        empty(inputs, memory, mc.GRM(), mc.Constant(4)).rewind(np.array([0, 0]))
