"""Masks that a layer cannot follow: refused where they are known, NaN where they are traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.call_documents import Call, documents
from memcache_jax.nn.rotary import rotate
from tests.cases import assert_close
from tests.nn.caches import language_model
from tests.nn.layer import make, tokens

LENGTH = 9
CAUSAL = np.tri(LENGTH, dtype=bool)
WINDOW = CAUSAL & ~np.tri(LENGTH, k=-3, dtype=bool)
HOLE = CAUSAL.copy()
HOLE[6, 2] = False
INNER_PADDING = CAUSAL & (np.arange(LENGTH) != 4)
HEADS = np.stack([CAUSAL, CAUSAL])
HEADS[1, 5, 3] = False
WRONG = {
    # What it is called, and the queries that see what the layer does.
    "bidirectional": (
        np.ones_like(CAUSAL),
        "token 0 of row 0 sees token 1, which is later: the mask is bidirectional",
        [8],
    ),
    "of padding alone": (
        np.arange(LENGTH)[None] < 7,
        "token 0 of row 0 sees token 1, which is later",
        [6, 7, 8],
    ),
    "window": (
        WINDOW,
        "token 3 of row 0 does not see token 0, as in a sliding window",
        [0, 1, 2],
    ),
    "hole": (
        HOLE,
        "token 6 of row 0 sees token 0 and not token 2: the mask has a hole",
        [0, 1, 2, 3, 4, 5, 7, 8],
    ),
    "padding within": (
        INNER_PADDING,
        "token 5 of row 0 sees token 0 and not token 4: the mask has a hole",
        [0, 1, 2, 3, 4],
    ),
    "without itself": (
        CAUSAL & ~np.eye(LENGTH, dtype=bool),
        "token 0 of row 0 does not see itself, and is no padding, which no token sees",
        [8],  # no token sees it
    ),
    "of one head": (
        HEADS[None],
        "token 5 of row 0 does not see the same in all heads",
        [0, 1, 2, 3, 4, 6, 7, 8],
    ),
}


@pytest.fixture(scope="module")
def masked():
    """A layer, and its outputs by a traced mask and by none in one program."""
    layer = make("linear")
    return layer, jax.jit(lambda x, mask: (layer(x, mask=mask), layer(x)))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_known_mask_is_refused_and_a_traced_one_gives_nan(masked, name):
    mask, message, right = WRONG[name]
    (layer, run), x = masked, tokens(LENGTH)
    with pytest.raises(ValueError, match=f"mask: {message}"):
        layer(x, mask=mask)
    y, causal = run(x, mask)
    nan = np.isnan(y)
    assert [t for t in range(LENGTH) if not nan[:, t].any()] == right
    assert nan.all(axis=2).sum() == 2 * (LENGTH - len(right))
    if name == "hole":  # the others' outputs are those of the documents that the mask has
        assert_close(y[:, right], causal[:, right], 1e-5)


@pytest.mark.slow
def test_only_the_rows_that_are_wrong_are_nan():
    layer, x = make("linear"), tokens(LENGTH)
    masks = np.stack([CAUSAL, WINDOW])
    y = jax.jit(lambda mask: layer(x, mask=mask))(masks)
    assert np.isnan(y[1, 3:]).all()
    assert np.isfinite(y[0]).all()
    with pytest.raises(ValueError, match="token 3 of row 1 does not see token 0"):
        layer(x, mask=masks)


@pytest.mark.slow
def test_a_mask_that_is_added_to_scores():
    layer, x = make("linear"), tokens(LENGTH)
    added = np.where(CAUSAL, 0, -1e9).astype(np.float32)
    with pytest.raises(ValueError, match=r"booleans, or 0 and 1, got -1000000000.0; .* mask == 0"):
        layer(x, mask=added)
    y = jax.jit(lambda mask: layer(x, mask=mask))(added)
    assert np.isnan(y).all()


@pytest.mark.slow
def test_a_model_refuses_them_too():
    model, rows = language_model(), jnp.zeros((2, LENGTH), int)
    with pytest.raises(ValueError, match="token 3 of row 0 does not see token 0"):
        model(rows, mask=WINDOW)
    logits = nnx.jit(lambda model, mask: model(rows, mask=mask))(model, WINDOW)
    assert np.isnan(logits[:, 3:]).all()
    assert np.isfinite(logits[:, :3]).all()


@pytest.mark.slow
@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
def test_attention_follows_any_mask_of_earlier_tokens(traced):
    layer, x = mc.nn.Attention(16, 2, rngs=nnx.Rngs(0)), tokens(LENGTH)
    narrow = mc.nn.Attention(16, 2, window=3, rngs=nnx.Rngs(0))
    masks = dict(hole=HOLE, within=INNER_PADDING, heads=HEADS[None], window=WINDOW)

    @jax.jit
    def run(x, arrays):
        given = arrays if traced else masks
        of_masks = {name: layer(x, mask=given[name]) for name in given}
        own = {name: equation(layer, x, masks[name]) for name in masks}
        return of_masks, own, narrow(x), narrow(x, mask=CAUSAL)

    got, wanted, window, narrowed = run(x, masks)
    real = np.arange(LENGTH) != 4  # in "within" that token is padding
    for name, y in got.items():
        assert_close(y[:, real], wanted[name][:, real], 1e-5)
    assert_close(got["window"], window, 1e-5)
    assert_close(narrowed, window, 1e-5)
    assert jnp.abs(got["hole"] - got["within"]).max() > 1e-3


def equation(layer, x, mask):
    """Softmax attention with one mask for all rows."""
    (query, key, value), _ = layer._rows(x)
    query, key = (rotate(rows, layer.rope_base) for rows in (query, key))
    scores = jnp.einsum("bthk,bshk->bhts", query, key) / layer.head_dim**0.5
    mask = mask[None, None] if mask.ndim == 2 else mask
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return layer.out(jnp.einsum("bhts,bshk->bthk", weights, value).reshape(x.shape))


def test_attention_sees_no_later_token_by_a_mask():
    layer, x = mc.nn.Attention(16, 2, rngs=nnx.Rngs(0)), tokens(LENGTH)
    later = HEADS[None].copy()
    later[0, 1, 5, 7] = True  # in one head
    with pytest.raises(ValueError, match="token 5 of row 0 sees token 7, which is later"):
        layer(x, mask=later)
    y = jax.jit(lambda mask: layer(x, mask=mask))(later)
    assert np.flatnonzero(np.isnan(y).any(axis=(0, 2))).tolist() == [5]


@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
@pytest.mark.parametrize(
    ("positions", "numbers", "left"),
    [
        ([0, 1, 2, 3, 4], [1, 1, 1, 1, 1], 0),
        ([7, 8, 9, 10, 11], [1, 1, 1, 1, 1], 0),
        ([0, 1, 2, 0, 1], [1, 1, 1, 2, 2], 0),
        ([0, 0, 0, 1, 2], [1, 2, 3, 3, 3], 2),
        ([-1, -1, 0, 1, 2], [1, 2, 3, 3, 3], 2),
        ([-2, -1, 0, 1, 2], [1, 2, 3, 3, 3], 2),
        ([1, 1, 0, 1, 2], [1, 2, 3, 3, 3], 2),
        ([0, 1, 2, 2, 2], [1, 1, 1, 2, 3], 0),
        ([0, 1, -1, -1, -1], [1, 1, 2, 3, 4], 0),
        ([0, 1, 2, 6, 7], [1, 1, 1, 2, 2], 0),
        ([0, 0, 0, 0, 0], [1, 2, 3, 4, 5], 0),
    ],
)
def test_documents_of_positions(positions, numbers, left, traced):
    def run(positions):
        return documents(Call(None, None, positions, None), (1, 5))

    given = np.array(positions, np.int32)
    number, padding, right = jax.jit(run)(given) if traced else run(given)
    assert right is None
    if traced or max(numbers) > 1:
        assert number[0].tolist() == numbers
    else:
        assert number is None
    assert left == (0 if padding is None else padding[0])


@pytest.mark.slow
def test_single_tokens_before_a_document_keep_their_outputs():
    # They stand where padding would, and move to the row's end and back.
    layer, x = make("titans"), tokens(LENGTH)
    ids = jnp.array([[0, 1, 2, 2, 2, 2, 2, 2, 2]] * 2)
    positions = np.array([0, 0, 0, 1, 2, 3, 4, 5, 6])
    y, packed = jax.jit(lambda x: (layer(x, positions=positions), layer(x, ids)))(x)
    assert_close(y[:, :2], packed[:, :2], 1e-5)
