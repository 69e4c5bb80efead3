"""Calls with a cache: rows that are padded come out as rows alone, and go on from there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.cases import assert_close
from tests.covers import product
from tests.nn.caches import language_model
from tests.nn.hosts import LAYERS, LENGTH, MASKS, POSITIONS, SEGMENTS, VALID, inputs
from tests.nn.layer import make, tokens

PROMPT, ROOM = 14, 30
ROWS = 3  # padded on the left, whole, padded on the right after 13 tokens
COUNTS = VALID[:ROWS, :PROMPT].sum(axis=1)
# A host's cache has its padding too; its keys' places are not ours.
KEYS = np.pad(MASKS["of keys"][:ROWS], ((0, 0), (0, 0), (0, 7)))
PREFILLS: dict[str, Any] = {
    f"positions, {name}": dict(positions=positions[:ROWS, :PROMPT])
    for name, positions in POSITIONS.items()
} | {
    "mask": dict(mask=KEYS[:, :PROMPT]),
    "mask of heads": dict(mask=np.tile(KEYS[:, None, :PROMPT].astype(np.int32), (1, 2, 1, 1))),
    "segments": dict(segment_ids=SEGMENTS[:ROWS, :PROMPT]),
    "all": dict(
        segment_ids=SEGMENTS[:ROWS, :PROMPT],
        positions=np.maximum(np.arange(PROMPT)[None] - np.array([[5], [0], [0]]), 0),
        mask=KEYS[:, :PROMPT],
    ),
}


def next_step(call):
    """What a host passes with each row's next token."""
    step: dict[str, Any] = {}
    if "positions" in call:
        step["positions"] = COUNTS[:, None]
    if "mask" in call:
        step["mask"] = np.arange(ROOM)[None, None] <= COUNTS[:, None, None]
    if "segment_ids" in call:
        step["segment_ids"] = np.ones((ROWS, 1), int)
    return step


FEW = ("positions, zeros and repeats", "mask", "segments")


@pytest.mark.parametrize(
    ("name", "traced"),
    product(["titans, grm", "attention", "window"], dict(known=False, traced=True), turn=1),
)
def test_a_padded_prompt_and_its_next_token(name, traced):
    layer, x = LAYERS[name](nnx.Rngs(0)), inputs()[:ROWS]
    # Each row's tokens from its beginning.
    rows = jnp.stack([jnp.roll(x[0], -5, axis=0), x[1], x[2]])
    new = jnp.stack([rows[row, count] for row, count in enumerate(COUNTS)])[:, None]
    few = FEW if name == "window" else FEW[:1] if traced else FEW[1:]
    calls = PREFILLS if name == "attention" else {call: PREFILLS[call] for call in few}
    steps = {call: next_step(calls[call]) for call in calls}

    def run(layer, x, cache, calls, steps):
        got = {}
        for call in calls:
            y, after = layer(x, cache=cache, **calls[call])
            got[call] = y, after.position, layer(new, cache=after, **steps[call])[0]
        return got, layer(rows)

    arguments = layer.init_cache(ROWS, ROOM), calls, steps
    if traced:
        got, wanted = jax.jit(run)(layer, x[:, :PROMPT], *arguments)
    else:
        got, wanted = jax.jit(lambda layer, x: run(layer, x, *arguments))(layer, x[:, :PROMPT])
    for call, (y, position, step) in got.items():
        assert position.tolist() == COUNTS.tolist(), call
        for row, (begin, count) in enumerate(zip((5, 0, 0), COUNTS, strict=True)):
            assert_close(y[row, begin : begin + count], wanted[row, :count], 1e-5)
            assert_close(step[row, 0], wanted[row, count], 1e-5)


@pytest.mark.slow
def test_a_model_goes_on_from_a_padded_prompt():
    model = language_model()
    rows = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 23)
    positions = np.maximum(np.arange(LENGTH)[None] - np.array([[5], [0]]), 0)
    cache: Any = model.init_cache(2, ROOM)

    @nnx.jit
    def run(model, rows, positions, cache):
        whole = model(rows, positions=positions)
        first, cache = model(rows[:, :-1], cache=cache, positions=positions[:, :-1])
        last, cache = model(rows[:, -1:], cache=cache, positions=positions[:, -1:])
        return whole, jnp.concatenate([first, last], axis=1), cache.position

    whole, pieces, position = run(model, rows, positions, cache)
    assert position.tolist() == [LENGTH - 5, LENGTH]
    assert_close([pieces[0, 5:], pieces[1]], [whole[0, 5:], whole[1]], 2e-5)


WRONG: dict[str, Any] = {
    # After 4 tokens in each row, of 3 tokens: what is refused, and the rows that are NaN.
    "positions of another row": (
        dict(positions=np.array([[4, 5, 6], [5, 6, 7]])),
        r"positions must count on from the 4 tokens that row 1 of the cache has, got \[5, 6, 7\]",
        [1],
    ),
    "positions from the beginning": (
        dict(positions=np.arange(3)),
        "positions must count on from the 4 tokens that row 0",
        [0, 1],
    ),
    "positions with a gap": (
        dict(positions=np.array([4, 5, 7])),
        r"positions must count on from the 4 tokens that row 0 .* got \[4, 5, 7\]",
        [0, 1],
    ),
    "two documents by positions": (
        dict(positions=np.array([0, 4, 5])),
        "",
        [],  # the first token is padding
    ),
    "two segments": (
        dict(segment_ids=np.array([[3, 3, 3], [3, 3, 4]])),
        r"a cache holds one document per row, got segment_ids \[3, 3, 4\] in row 1",
        [1],
    ),
    "two segments of one token": (
        dict(segment_ids=np.array([[1, 2, 0], [1, 0, 0]])),
        r"a cache holds one document per row, got segment_ids \[1, 2, 0\] in row 0",
        [0],
    ),
    "a window": (
        dict(mask=np.tri(3, 20, 4) - np.tri(3, 20, -1)),
        "mask: with a cache, each token must see .* row 0 of the cache has 4, and token 1 of this",
        [0, 1],
    ),
    "a mask of others' keys": (
        dict(mask=np.stack([np.tri(3, 7, 4), np.tri(3, 7, 4)[:, ::-1]])),
        "",
        [],  # as many, whatever their places
    ),
    "a mask that forgets": (
        dict(mask=np.array([[1] * 5 + [0] * 3, [0] + [1] * 6 + [0], [1] * 7 + [0]])),
        "mask: with a cache, each token must see .* token 1 of this call",
        [0, 1],
    ),
    "a mask of the call alone": (
        dict(mask=np.tri(3, dtype=bool)),
        "mask: with a cache, each token must see .* token 0 of this call sees others",
        [0, 1],
    ),
}


@pytest.fixture(scope="module")
def begun():
    """A layer, its compiled step and a cache after four tokens in each row."""
    layer = make("linear")
    run = jax.jit(lambda x, cache, call: layer(x, cache=cache, **call))
    return layer, run, run(tokens(7)[:, :4], layer.init_cache(2, 20), {})[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_does_not_continue_its_row(begun, name):
    call, message, nan = WRONG[name]
    (layer, run, cache), x = begun, tokens(7)
    y, _ = run(x[:, 4:], cache, call)
    assert np.flatnonzero(np.isnan(y).all(axis=(1, 2))).tolist() == nan
    assert np.isnan(y).any(axis=(1, 2)).sum() == len(nan)
    if message:
        with pytest.raises(ValueError, match=message):
            layer(x[:, 4:], cache=cache, **call)
    else:
        layer(x[:, 4:], cache=cache, **call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(document_ids=jnp.ones((2, 7), int)), "one document per row: give no document_ids"),
        (dict(segment_ids=np.zeros((2, 7), int)), "segment_ids are all 0, which is padding"),
        (dict(mask=np.ones((2, 6, 7))), r"mask must broadcast to \(b, h, t, keys\) = \(2, 2, 7"),
    ],
)
def test_what_no_cache_takes(call, message):
    layer = make("linear")
    with pytest.raises(ValueError, match=message):
        layer(tokens(7), cache=layer.init_cache(2, 20), **call)


@pytest.mark.slow
def test_rows_of_padding_alone_stay_where_they_are():
    layer = make("linear")
    ids = np.array([[0] * 7, [1] * 7])
    _, cache = layer(tokens(7), cache=layer.init_cache(2, 20), segment_ids=ids)
    assert cache.position.tolist() == [0, 7]


@pytest.mark.usefixtures("unchecked")
def test_a_cache_of_another_layer_or_of_other_rows():
    layer, positions = make("linear"), np.arange(7)
    attention: Any = LAYERS["attention"](nnx.Rngs(0))
    with pytest.raises(ValueError, match="the cache was made for another layer: AttentionCache"):
        layer(tokens(7), cache=attention.init_cache(2, 20), positions=positions)
    with pytest.raises(ValueError, match="the cache has 3 rows, got tokens of 2"):
        layer(tokens(7), cache=layer.init_cache(3, 20), positions=positions)
    with pytest.raises(ValueError, match="the cache was made for another layer: LayerCache"):
        attention(tokens(7), cache=layer.init_cache(2, 20), positions=positions)
    other: Any = layer.init_cache(2, 20)
    with pytest.raises(ValueError, match="the cache must be a LanguageModel's, got LayerCache"):
        language_model()(jnp.zeros((2, 3), int), cache=other)
