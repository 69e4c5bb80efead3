"""Several pooled keys of each state: by the fast path, documents, streams and meshes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memcache_jax as mc
from memcache_jax.engine.gates import gates_of_tokens
from memcache_jax.kernels._dispatch import interpret_kernels
from memcache_jax.training import model_options
from tests.cases import MEMORIES, SEGMENTATIONS, assert_close, make_inputs, normals
from tests.covers import product
from tests.streams import empty, over_time, streamed, whole

LENGTH, SIZE = 22, 4
# Documents that begin within spans, on their borders, and with a segment.
IDS = np.array([[0] * 5 + [1] * 2 + [2] * 5 + [3] * 10, [0] * 11 + [4] * 7 + [0] * 4])
SSC = mc.SSC(top_k=2, num_keys=2)
# Segments of several blocks: with spans of half a block and more, and of whole blocks.
SEVERAL = {
    "lengths": mc.Lengths((4, 8, 6, 4)),
    "adaptive": mc.Adaptive(4, 8, 0.9, block=2),
    "by errors": mc.Adaptive(4, 8, block=4, by="errors"),
    "by scores": mc.Adaptive(4, 8, block=2, by="scores"),
}
CASES = {name: make(SIZE) for name, make in SEGMENTATIONS.items()} | SEVERAL


def relevance_by_hand(key, connector, num_keys):
    """Of one head with segments of ``SIZE`` tokens: cached states' (t, n), and the live one's."""
    length = len(key)
    cached = np.full((length, (length - 1) // SIZE), -np.inf)
    live, span = np.zeros(length), SIZE // num_keys
    for t in range(length):
        begin = t // SIZE * SIZE

        def best(first, after, t=t):
            begins = range(first, after, span)
            means = [key[i : min(i + span, after)].mean(axis=0) for i in begins]
            return max(mean @ connector[t] for mean in means)

        live[t] = best(begin, t + 1)
        for i in range(t // SIZE):
            cached[t, i] = best(i * SIZE, (i + 1) * SIZE)
    return cached, live


@pytest.mark.parametrize("num_keys", [1, 2, 4])
def test_a_state_is_as_relevant_as_its_best_key(num_keys):
    normal = normals(0, np.float32)
    key, connector = normal(1, LENGTH, 1, 6), 2 * normal(1, LENGTH, 1, 6)
    cached, live = relevance_by_hand(key[0, :, 0], connector[0, :, 0], num_keys)
    every = np.concatenate([cached, live[:, None]], axis=1)
    weights = np.exp(every - every.max(axis=1, keepdims=True))
    got = gates_of_tokens(
        *map(jnp.asarray, (key, connector)),
        aggregation=mc.GRM(num_keys=num_keys),
        segmentation=mc.Constant(SIZE),
    )
    np.testing.assert_allclose(got[0, :, 0], weights / weights.sum(axis=1)[:, None], atol=1e-5)
    best = gates_of_tokens(
        *map(jnp.asarray, (key, connector)),
        aggregation=mc.SSC(top_k=1, num_keys=num_keys),
        segmentation=mc.Constant(SIZE),
    )
    read = np.asarray(best)[0, SIZE:, 0, :-1]
    np.testing.assert_array_equal(read.argmax(axis=1), cached[SIZE:].argmax(axis=1))


@functools.partial(jax.jit, static_argnames=("plan", "implementation"))
def outputs_and_gradients(inputs, mask, ids, plan, implementation=None):
    segmentation, start = plan

    def outputs(inputs):
        return mc.memory_caching(
            **inputs,
            memory=MEMORIES["linear"],
            aggregation=SSC,
            segmentation=CASES[segmentation],
            start=start,
            document_ids=ids,
            implementation=implementation,
        )

    y, pull = jax.vjp(outputs, inputs)
    cotangent = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return y, pull(jnp.where(mask[..., None, None], cotangent, 0))[0]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("segmentation", "ids"), product([*CASES], {"one document": None, "documents": IDS}, turn=1)
)
def test_fast_path_and_what_is_not_read(segmentation, ids):
    """Equal to the recurrence, with gradients; what is of a later token or another document is not.

    Neither numbers that are not finite nor their gradients reach what does not read them.
    """
    inputs = make_inputs(MEMORIES["linear"], LENGTH, heads=1)
    if segmentation == "by scores":
        inputs["border"] = normals(1, np.float64)(2, LENGTH, 1)
    every = np.ones((2, LENGTH), bool)
    run = functools.partial(outputs_and_gradients, ids=ids, plan=(segmentation, "independent"))
    y, gradients = run(inputs, every)
    assert_close((y, gradients), run(inputs, every, implementation="reference"), 1e-12)

    token = 9
    blind = np.arange(LENGTH) < token
    if ids is not None:
        document = np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)
        blind = blind | (document != document[:, [token]])
    blind = np.broadcast_to(blind, every.shape)
    broken = {name: np.array(x) for name, x in inputs.items() if name in ("key", "value")}
    broken["key"][:, token] = np.nan
    y_broken, gradients_broken = run(inputs | broken, blind)
    assert_close(y_broken[blind], y[blind], 1e-12)
    assert not np.isfinite(y_broken[~blind]).any()
    _, gradients = run(inputs, blind)
    for name in ("query", "connector"):
        assert_close(gradients_broken[name][blind], gradients[name][blind], 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("memory", "aggregation", "segmentation", "start"),
    [
        # Spans shorter than a chunk.
        ("titans", mc.Soup(num_keys=4), mc.Constant(8), "independent"),
        ("linear", mc.SSC(top_k=2, num_keys=2, pooling="sum"), mc.Logarithmic(4), "independent"),
        ("linear", mc.GRM(num_keys=2), mc.Logarithmic(4), "checkpoint"),
        ("linear", SSC, mc.Lengths((4, 8, 6, 4, 10, 8)), "checkpoint"),
        ("titans", SSC, mc.Adaptive(4, 16, 0.9, block=4), "independent"),
    ],
    ids=["constant", "logarithmic", "checkpoint", "lengths", "adaptive"],
)
def test_streams(memory, aggregation, segmentation, start):
    rule = MEMORIES[memory]
    inputs = make_inputs(rule, 37, batch=1, heads=1)
    case = rule, aggregation, segmentation, start
    assert_close(streamed(inputs, *case, split=(3, 33, 1)), whole(inputs, *case), 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradients_of_streams():
    """Also of levels that hold no state yet."""
    case = MEMORIES["linear"], mc.GRM(num_keys=2), mc.Logarithmic(8), "independent"
    inputs = make_inputs(case[0], 21, batch=1, heads=1)

    def gradient(function, **options):
        return jax.grad(lambda x: function(inputs | x, *case, **options).sum())(
            {name: jnp.asarray(inputs[name]) for name in ("key", "value", "connector")}
        )

    assert_close(gradient(streamed, split=(20, 1)), gradient(whole), 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_streams_go_back_and_merge():
    memory = MEMORIES["linear"]
    inputs = make_inputs(memory, 19, batch=1, heads=1)
    case = memory, mc.GRM(num_keys=2), mc.Constant(SIZE)
    extend = jax.jit(mc.extend)

    def tokens(begin, end):
        return over_time(inputs, memory, lambda x: x[:, begin:end])

    # Back over a segment's end.
    y, cache = extend(empty(inputs, *case, rewind=8), **tokens(0, 17))
    again, _ = extend(cache.rewind(np.array([7])), **tokens(10, 17))
    assert_close(again, y[:, 10:], 1e-12)

    # The keys of two states that merge are merged one by one.
    cache = empty(inputs, *case, segments=1, policy="merge")
    for begin in range(0, 8, 4):
        _, cache = extend(cache, **tokens(begin, begin + 4))
    means = inputs["key"][0, :8, 0].reshape(2, 2, 2, -1).mean(axis=2)
    assert_close(cache.pooled[0, 0, 0], means.mean(axis=0), 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_streams_of_adaptive_segments_go_back():
    memory = MEMORIES["linear"]
    inputs = make_inputs(memory, 19, batch=1, heads=1)
    case = memory, mc.GRM(num_keys=2), mc.Adaptive(4, 8, 0.9, block=2)
    extend = jax.jit(mc.extend)
    first, last = (over_time(inputs, memory, lambda x, b=b: x[:, b:17]) for b in (0, 10))
    y, cache = extend(empty(inputs, *case, rewind=8), **first)
    again, _ = extend(cache.rewind(np.array([7])), **last)
    assert_close(again, y[:, 10:], 1e-12)


@pytest.mark.slow
def test_spans_of_equal_segments_are_those_of_constant_ones():
    normal = normals(0, np.float32)
    tokens = jnp.asarray(normal(1, LENGTH, 1, 6)), jnp.asarray(2 * normal(1, LENGTH, 1, 6))

    def gates(segmentation):
        run = functools.partial(gates_of_tokens, aggregation=SSC, segmentation=segmentation)
        return jax.jit(run)(*tokens)

    wanted = gates(mc.Constant(8))
    for segmentation in (mc.Lengths((8, 8, 8)), mc.Adaptive(4, 8, 2.0)):
        assert_close(gates(segmentation)[..., np.array([0, 1, -1])], wanted, 1e-6)


@pytest.mark.slow
def test_a_language_model_and_its_cache():
    """The keys of layers in a stack; the model's options name them."""
    mixer = mc.nn.MemoryCachingMixer(mc.memories.SSD(), SSC, mc.Constant(SIZE))
    config = mc.nn.LanguageModelConfig(
        13, 2, features=8, num_heads=2, mlp_features=8, mixers=(mixer,)
    )
    described = model_options(config)
    assert described.aggregation["num_keys"] == 2
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 13, (2, LENGTH))
    wanted = nnx.jit(lambda model, tokens: model.hidden(tokens))(model, tokens)
    cache = model.init_cache(2, LENGTH)
    extend = nnx.jit(lambda model, tokens, cache: model.extend(tokens, cache))
    for begin in range(0, LENGTH, 11):
        hidden, cache = extend(model, tokens[:, begin : begin + 11], cache)
        assert_close(hidden, wanted[:, begin : begin + 11], 1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("segmentation", "ids"),
    [(mc.Constant(4), IDS), (mc.Logarithmic(4), None)],
    ids=["documents", "logarithmic"],
)
def test_parts_of_a_mesh(segmentation, ids):
    memory = MEMORIES["linear"]
    mesh = jax.make_mesh((2, 2), ("rows", "time"), axis_types=(AxisType.Explicit,) * 2)
    inputs = make_inputs(memory, LENGTH, heads=1, dtype=np.float32)
    how: Any = dict(memory=memory, aggregation=SSC, segmentation=segmentation)

    @jax.jit
    def run(inputs, ids):
        return mc.memory_caching(**inputs, **how, document_ids=ids)

    wanted = run(inputs, ids)
    with jax.set_mesh(mesh):
        along = NamedSharding(mesh, P("rows", "time"))
        moved = jax.tree.map(lambda x: jax.device_put(x, along), (inputs, ids))
        assert_close(run(*moved), wanted, 1e-5)
        if isinstance(segmentation, mc.Logarithmic):
            with pytest.raises(ValueError, match="got num_keys=2: so have those of several segm"):
                run(moved[0], jax.device_put(IDS, along))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_kernels_read_what_is_selected():
    memory = MEMORIES["linear"]
    inputs = make_inputs(memory, LENGTH, batch=1, heads=1, dtype=np.float32)
    how: Any = dict(memory=memory, aggregation=SSC, segmentation=mc.Constant(SIZE))
    wanted = mc.memory_caching(**inputs, **how)
    with interpret_kernels():
        got = mc.memory_caching(**inputs, **how, implementation="pallas_tpu")
    assert_close(got, wanted, 1e-5)


def test_what_has_one_key():
    for segmentation in (mc.Constant(9), mc.Lengths((3, 6)), mc.Adaptive(4, 12)):
        with pytest.raises(ValueError, match="num_keys=2 needs Constant or Logarithmic segments"):
            mc.nn.MemoryCachingMixer(MEMORIES["linear"], SSC, segmentation)
    for gate in ("uniform", "position"):
        with pytest.raises(ValueError, match="num_keys=3 needs a gate that compares keys, got"):
            mc.GRM(gate, num_keys=3)
    with pytest.raises(ValueError, match="num_keys must be"):
        mc.SSC(num_keys=0)
