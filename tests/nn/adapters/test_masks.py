"""Which masks a memory honours, and what they say of the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memcache_jax.nn.adapters import _masks

# Numbers of documents; 0 for padding.
ROWS = jnp.asarray([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 2, 2, 0, 0], [0, 1, 0, 2, 2, 0]])


def causal(documents):
    """As hosts make it: real tokens of the same document, up to the token itself."""
    same = (documents[:, :, None] == documents[:, None, :]) & (documents > 0)[:, None]
    return same & jnp.tril(jnp.ones(same.shape[1:], bool))[None]


def test_documents_and_padding():
    rows = _masks.read_mask(causal(ROWS))
    np.testing.assert_array_equal(rows.real, ROWS > 0)
    first = np.where(ROWS > 0, rows.first, -1)
    expected = [[0] * 6, [-1, -1, 2, 2, 2, 2], [0, 0, 2, 2, -1, -1], [-1, 1, -1, 3, 3, -1]]
    np.testing.assert_array_equal(first, expected)
    assert rows.honoured.all()


def hole(mask):
    return mask.at[:, :, 2].set(False)


def window(mask):
    return mask & jnp.triu(jnp.ones(mask.shape[1:], bool), -2)[None]


def prefix(mask):
    return mask.at[:, :3, :3].set(True)


@pytest.mark.parametrize(
    ("change", "known"),
    [(hole, [1, 1, 1, 0, 0, 0]), (window, [1, 1, 1, 0, 0, 0]), (prefix, [0, 0, 1, 1, 1, 1])],
)
def test_other_masks(change, known):
    y = jnp.ones((1, 6, 2))
    honoured = _masks.read_mask(change(causal(ROWS[:1]))).honoured
    np.testing.assert_array_equal(honoured[0], known)
    with pytest.raises(ValueError, match=f"at row 0, token {known.index(0)}"):
        _masks.checked(honoured, y)
    traced = jax.jit(_masks.checked)(honoured, y)
    np.testing.assert_array_equal(np.isfinite(traced[0, :, 0]), known)


def test_masks_of_a_stream():
    documents = jnp.asarray([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 1]])
    mask = jnp.pad(causal(documents), ((0, 0), (0, 0), (0, 3)))
    padding, lengths, honoured = _masks.read_next(mask[:, :4], 0, jnp.zeros(2, int))
    assert (padding.tolist(), lengths.tolist(), bool(honoured.all())) == ([2, 1], [2, 3], True)
    for begin in (4, 5, 6):
        _, new, honoured = _masks.read_next(mask[:, begin : begin + 1], begin, lengths)
        assert honoured.all()
        lengths = lengths + new
    assert lengths.tolist() == [5, 5]

    forgotten = mask.at[:, 4, 2].set(False)[:, 4:5]
    _, _, honoured = _masks.read_next(forgotten, 4, jnp.asarray([2, 3]))
    assert not honoured.any()
    two = causal(jnp.asarray([[1, 1, 2, 2]]))
    assert _masks.read_next(two, 0, jnp.zeros(1, int))[2].tolist() == [[True, True, False, False]]


def test_the_mask_has_three_axes():
    with pytest.raises(ValueError, match="must be \\(b, t, s\\) with s >= t"):
        _masks.read_mask(jnp.ones((2, 4, 3), bool))
    with pytest.raises(ValueError, match="got shape \\(2, 1, 4, 4\\)"):
        _masks.read_mask(jnp.ones((2, 1, 4, 4), bool))


def test_shift_undoes_itself():
    x = jnp.arange(12).reshape(2, 6)
    by = jnp.asarray([1, 4])
    np.testing.assert_array_equal(_masks.shift(x, by)[:, 0], [1, 10])
    np.testing.assert_array_equal(_masks.shift(_masks.shift(x, by), -by), x)
