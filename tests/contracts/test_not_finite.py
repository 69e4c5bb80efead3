"""A token that is not finite changes no token before it, of another document, row or head."""

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
from memcache_jax.kernels._dispatch import interpret_kernels
from tests.cases import (
    COVER,
    FAMILIES,
    MEMORIES,
    STARTS,
    combine,
    make_inputs,
    run_all,
)
from tests.covers import first_kept, kept_of, product, rules

LENGTH, SIZE = 22, 8
IDS = np.repeat([0, 1, 2], [9, 5, 8]).astype(np.int32)[None].repeat(2, axis=0)
EACH = combine(["grm"], [("constant", "independent")]) + combine(
    ["ssc_soup"], [("logarithmic", "checkpoint")]
)
DOCUMENTS = combine(["residual"], [("constant", "checkpoint")]) + combine(
    ["grm"], [("logarithmic", "independent")]
)
CHANGES = (("value", np.nan), ("key", np.inf), ("control", np.nan), ("value", -np.inf))


def broken_at(inputs, memory, token, argument, number, row=0):
    """The inputs with a number in one token of a row and of the first head."""
    changed = inputs | {"controls": dict(inputs["controls"])}
    of_tokens = [n for n, control in memory.controls.items() if control.axes != "h"]
    if argument == "control" and of_tokens:
        holder, argument = changed["controls"], of_tokens[0]
    else:
        holder, argument = changed, "value" if argument == "control" else argument
    holder[argument] = holder[argument].copy()
    holder[argument][(row, token, 0, 1)[: holder[argument].ndim]] = number
    return changed


def check(run, inputs, memory, ids=None, tokens=(5, 10, 15)):
    """Compares outputs that a broken token must not reach; all that it does reach are NaN."""
    wanted = jax.tree.map(np.asarray, run(inputs))
    for token, (argument, number) in zip(tokens, CHANGES, strict=False):
        got = run(broken_at(inputs, memory, token, argument, number))
        moved = run(broken_at(inputs, memory, token, argument, -0.7))
        same = np.ones((2, LENGTH, inputs["key"].shape[2]), bool)
        same[0, :, 0] = np.arange(LENGTH) < token
        if ids is not None:
            same[0, :, 0] |= ids[0] != ids[0, token]
        for case, y in jax.tree.leaves_with_path(got):
            y = np.asarray(y)
            clean, other = (
                np.asarray(functools.reduce(lambda tree, key: tree[key.key], case, tree))
                for tree in (wanted, moved)
            )
            np.testing.assert_allclose(y[same], clean[same], atol=2e-5, err_msg=str(case))
            reached = np.max(np.abs(other - clean), axis=-1) > 1e-3
            reached[0, token, 0] = True
            if argument == "key" and not memory.accumulates:
                continue  # running keys leave out what is not finite
            assert np.isnan(y[reached]).any(axis=-1).all(), (case, token, argument)


@pytest.mark.parametrize("name", rules(1, "linear", among=COVER))
def test_one_pass(name):
    memory = MEMORIES[name]
    inputs = make_inputs(memory, LENGTH, heads=2, dtype=np.float32)
    check(lambda inputs: run_all(inputs, memory, size=SIZE, cases=EACH), inputs, memory)


@pytest.mark.parametrize("name", rules(2, among=COVER))
def test_documents(name):
    memory = MEMORIES[name]
    inputs = make_inputs(memory, LENGTH, heads=2, dtype=np.float32)
    run = functools.partial(run_all, memory=memory, size=SIZE, cases=DOCUMENTS, document_ids=IDS)
    check(run, inputs, memory, IDS, tokens=(8, 5, 12))


@pytest.mark.parametrize(("name", "start"), product([*FAMILIES, "swla", "vector"], STARTS, turn=0))
def test_streams(name, start):
    memory = MEMORIES[name]
    kind = mc.SSC(top_k=1) if start == "independent" else mc.GRM()
    how: Any = dict(memory=memory, aggregation=kind, segmentation=mc.Constant(SIZE), start=start)
    inputs = make_inputs(memory, LENGTH, heads=2, dtype=np.float32)

    @jax.jit
    def run(inputs):
        cache = mc.init_cache(2, 2, 4, 4, **how, weights=inputs["weights"], max_length=LENGTH)
        outputs = []
        for begin, end in ((0, 6), (6, 7), (7, LENGTH)):
            piece = {n: x for n, x in inputs.items() if n != "weights"}
            piece = jax.tree.map(lambda x, b=begin, e=end: x[:, b:e] if x.ndim > 1 else x, piece)
            y, cache = mc.extend(cache, **piece)
            outputs.append(y)
        return {"stream": jnp.concatenate(outputs, axis=1)}

    check(run, inputs, memory)


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_rows_of_a_stream_whose_buckets_compose(cache_dtype):
    """Each at a position of its own; the row with the broken token begins anew."""
    memory = MEMORIES["gated_deltanet"]
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Logarithmic(2))
    inputs = make_inputs(memory, LENGTH, batch=3, heads=2, dtype=np.float32)
    one_pass = jax.jit(lambda inputs: mc.memory_caching(**inputs, **how))
    clean = np.asarray(one_pass(inputs))
    broken = broken_at(inputs, memory, 6, "value", np.nan, row=1)
    wanted = np.asarray(one_pass(broken))
    assert np.isnan(wanted[1, 6:, 0]).any(axis=-1).all()
    assert np.isfinite(wanted[1, :, 1]).all()
    tolerance = dict(float32=2e-5, int8=0.05)[cache_dtype]

    cache = mc.init_cache(3, 2, 4, 4, **how, max_length=LENGTH, cache_dtype=cache_dtype)
    step, position = jax.jit(mc.extend), np.zeros(3, int)

    def extend(cache, sequences, position, rows, lengths):
        """These rows of the sequences from their positions on, and what each row should give."""
        there = np.minimum(position[:, None] + np.arange(9)[None], LENGTH - 1)
        tokens = {n: x for n, x in sequences.items() if n != "weights"}
        part = jax.tree.map(lambda x: x[np.array(rows)[:, None], there], tokens)
        return step(cache, **part, lengths=np.array(lengths))

    def compare(y, one_pass, rows, position, lengths):
        for row, begin, count, out in zip(rows, position, lengths, np.asarray(y), strict=True):
            np.testing.assert_allclose(
                out[:count], one_pass[row, begin : begin + count], atol=tolerance
            )

    for lengths in ([5, 9, 1], [9, 4, 9], [0, 9, 9]):
        y, cache = extend(cache, broken, position, [0, 1, 2], lengths)
        compare(y, wanted, [0, 1, 2], position, lengths)
        position += lengths

    cache = cache.reset(np.array([False, True, False])).take(np.array([1, 0, 2]))
    position, lengths = np.array([0, *position[::2]]), [9, 8, 3]
    y, _ = extend(cache, inputs, position, [1, 0, 2], lengths)
    compare(y, clean, [1, 0, 2], position, lengths)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "start", "segmentation", "exchange"),
    first_kept(
        3,
        [
            ("ssd", "checkpoint", mc.Constant(4), "gather"),
            ("gated_deltanet", "independent", mc.Constant(4), "ring"),
            ("gated_deltanet", "independent", mc.Logarithmic(4), "gather"),
            ("ssd", "checkpoint", mc.Constant(4), "ring"),
            ("gated_deltanet", "independent", mc.Constant(4), "gather"),
        ],
    ),
    ids=str,
)
def test_parts_of_a_mesh(name, start, segmentation, exchange):
    memory = MEMORIES[name]
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Explicit,))
    inputs = make_inputs(memory, LENGTH, heads=2, dtype=np.float32)
    inputs["controls"]["log_alpha"] *= 0.1  # a token is felt to the end
    how: Any = dict(aggregation=mc.GRM(), segmentation=segmentation, start=start)

    @jax.jit
    def run(inputs):
        return {"mesh": mc.memory_caching(**inputs, memory=memory, **how, exchange=exchange)}

    def over_time(inputs):
        with jax.set_mesh(mesh):
            return run(
                jax.tree.map(
                    lambda x: jax.device_put(
                        x, NamedSharding(mesh, P(None, "context") if x.ndim > 1 else P())
                    ),
                    inputs,
                )
            )

    check(over_time, inputs, memory)


@pytest.mark.parametrize("name", kept_of(FAMILIES.keys(), "gated_deltanet"))
def test_kernels(name):
    memory = MEMORIES[name]
    how: Any = dict(aggregation=mc.SSC(top_k=1), segmentation=mc.Constant(SIZE))
    how["implementation"] = "pallas_tpu"
    inputs = make_inputs(memory, LENGTH, heads=2, dtype=np.float32)

    @jax.jit
    def run(inputs):
        return {"kernel": mc.memory_caching(**inputs, memory=memory, **how)}

    with interpret_kernels():
        check(run, inputs, memory)


@pytest.mark.parametrize(
    ("window", "documents", "path"),
    [
        case
        for case in product([None, 6], [False, True], ["whole", "mask", "stream"])
        if case.values[1:] != (True, "stream")  # a stream's row is one document
    ],
)
def test_attention(window, documents, path):
    layer = mc.nn.Attention(8, 2, window=window, rngs=nnx.Rngs(0))
    ids = jnp.asarray(IDS) if documents else None
    mask = np.tril(np.ones((1, 1, LENGTH, LENGTH), bool))

    @nnx.jit
    def run(layer, x):
        if path == "stream":
            cache = layer.init_cache(2, None if window else LENGTH)
            outputs = []
            for begin, end in ((0, 6), (6, 7), (7, LENGTH)):
                y, cache = layer.extend(x[:, begin:end], cache)
                outputs.append(y)
            return jnp.concatenate(outputs, axis=1)
        return layer(x, ids, **({"mask": mask} if path == "mask" else {}))

    x = np.array(jax.random.normal(jax.random.key(0), (2, LENGTH, 8)))
    wanted = run(layer, x)
    for token, number in ((5, np.nan), (10, np.inf)):
        broken = x.copy()
        broken[0, token, 3] = number
        y = np.asarray(run(layer, broken))
        same = np.ones((2, LENGTH), bool)
        same[0] = np.arange(LENGTH) < token
        if window:
            same[0] |= np.arange(LENGTH) >= token + window
        if ids is not None:
            same[0] |= ids[0] != ids[0, token]
        np.testing.assert_allclose(y[same], np.asarray(wanted)[same], atol=1e-5)
        assert np.isnan(y[~same]).all()
