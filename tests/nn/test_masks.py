"""Shapes of masks."""

import numpy as np
import pytest

from memcache_jax.nn.masks import padding_tokens, read_mask

BATCH, HEADS, LENGTH = 3, 2, 5


@pytest.mark.parametrize(
    ("shape", "read"),
    [
        ((5, 5), (1, 1, 5, 5)),
        ((1, 5), (1, 1, 5, 5)),
        ((3, 5, 5), (3, 1, 5, 5)),
        ((2, 5, 5), (1, 2, 5, 5)),
        ((1, 5, 5), (1, 1, 5, 5)),
        ((3, 1, 5), (3, 1, 5, 5)),
        ((3, 1, 5, 5), (3, 1, 5, 5)),
        ((1, 2, 5, 5), (1, 2, 5, 5)),
        ((3, 1, 1, 5), (3, 1, 5, 5)),
    ],
    ids=str,
)
def test_a_mask_broadcasts(shape, read):
    mask = np.random.default_rng(0).integers(0, 2, shape)
    got = read_mask(mask, (BATCH, LENGTH), HEADS, keys=LENGTH, xp=np)
    assert got.seen.shape == read
    assert got.legible.all()
    mask = mask[:, None] if shape[0] == 3 and mask.ndim == 3 else mask
    np.testing.assert_array_equal(got.seen, np.broadcast_to(mask, read))


def test_the_first_of_three_axes_is_the_batch_where_heads_are_as_many():
    mask = np.zeros((2, 5, 5), bool)
    assert read_mask(mask, (2, 5), 2, keys=5, xp=np).seen.shape == (2, 1, 5, 5)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (5, 6), (4, 5, 5), (3, 4, 5, 5), (1, 3, 2, 5, 5)])
def test_a_mask_that_does_not_fit(shape):
    message = r"mask must broadcast to \(b, h, t, t\) = \(3, 2, 5, 5\), got shape"
    with pytest.raises(ValueError, match=message):
        read_mask(np.zeros(shape), (BATCH, LENGTH), HEADS, keys=LENGTH, xp=np)


def test_keys_of_any_number():
    mask = np.zeros((3, 5, 17))
    assert read_mask(mask, (BATCH, LENGTH), HEADS, keys=None, xp=np).seen.shape == (3, 1, 5, 17)
    with pytest.raises(ValueError, match=r"\(b, h, t, keys\) = \(3, 2, 5, any\), got shape"):
        read_mask(mask[:, :4], (BATCH, LENGTH), HEADS, keys=None, xp=np)


def test_padding_is_seen_by_no_token():
    seen = np.tri(4, dtype=bool)[None, None] & np.array([True, False, True, True])
    assert padding_tokens(seen, np).tolist() == [[False, True, False, False]]
    seen = seen.copy()
    seen[..., 3, 1] = True
    assert not padding_tokens(seen, np).any()
