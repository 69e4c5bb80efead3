"""Borders that tokens decide, against a plain loop over blocks."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import memcache_jax as mc
from memcache_jax.engine.borders import find_borders
from tests.cases import unit

SEGMENTATION, LENGTH = mc.Adaptive(8, 16, 0.5, block=4), 61
SIZES = (SEGMENTATION.min, SEGMENTATION.max, SEGMENTATION.size)


def keys_of_topics(seed, batch=2, length=LENGTH, heads=2, dim=4):
    """Keys (b, t, h, k) around a direction that changes at random tokens of each row."""
    random = np.random.default_rng(seed)
    topics = random.standard_normal((batch, length, heads, dim))
    topic: Any = np.cumsum(random.random((batch, length)) < 1 / 9, axis=1)
    shared = np.take_along_axis(topics, topic[:, :, None, None], axis=1)
    return unit(shared + 0.3 * random.standard_normal(shared.shape))


def segments_of(key, ids=None):
    """Numbers of segments (t,) of one row (t, h, k): borders one after the other."""
    fewest, most, size = SIZES
    ids = np.zeros(len(key)) if ids is None else ids
    segment, number, first, total = [], 0, 0, 0.0
    for begin in range(0, len(key), size):
        document = ids[min(begin + size, len(key)) - 1]
        # The document that goes on after the block, from where it began.
        if begin and document != ids[begin - 1]:
            first, total = begin, 0.0
        segment += [number] * size
        own = np.where((ids == document)[:, None, None], key, 0)[begin : begin + size].sum(axis=0)
        tokens, surprise = begin + size - first, 0.0
        if begin > first:
            cosines = np.sum(total * own, axis=-1)
            cosines /= np.linalg.norm(total, axis=-1) * np.linalg.norm(own, axis=-1)
            surprise = 1 - cosines.mean()
        total = total + own
        if tokens >= most or (tokens >= fewest and surprise > SEGMENTATION.threshold):
            number, first, total = number + 1, begin + size, 0.0
    return np.array(segment[: len(key)])


def found(key, ids=None):
    moved = jnp.moveaxis(jnp.asarray(key), 1, 2)
    return find_borders(SEGMENTATION, moved, None if ids is None else jnp.asarray(ids))


def test_borders_are_those_of_the_loop():
    key = keys_of_topics(0, batch=6)
    borders = found(key)
    wanted = np.stack([segments_of(row) for row in key])
    np.testing.assert_array_equal(borders.of_tokens(LENGTH), wanted)
    assert len({tuple(row) for row in wanted}) > 3  # rows differ
    lengths = {n for row in wanted for n in np.bincount(row)[:-1].tolist()}
    assert lengths >= {8, 12, 16}
    for row, last in zip(wanted, np.asarray(borders.last), strict=True):
        ends = np.nonzero(np.diff(row[3::4]))[0]
        np.testing.assert_array_equal(last[: len(ends)], ends)


def test_borders_of_a_document_depend_on_no_other():
    key = keys_of_topics(1)
    ids = np.array([[0] * 20 + [1] * 21 + [2] * 20, [0] * 9 + [1] * 52])
    segment = np.asarray(found(key, ids).of_tokens(LENGTH))
    for row in range(2):
        np.testing.assert_array_equal(segment[row] - ids[row], segments_of(key[row], ids[row]))
    # A document that begins with a block has the borders that it has alone.
    alone = np.asarray(found(key[:1, 20:41]).of_tokens(21))[0]
    together = segment[0, 20:41]
    np.testing.assert_array_equal(together - together[0], alone)


def test_borders_of_a_prefix_and_of_few_tokens():
    key = keys_of_topics(2)
    whole = np.asarray(found(key).of_tokens(LENGTH))
    for length in (1, 4, 33):
        part = found(key[:, :length])
        np.testing.assert_array_equal(part.of_tokens(length), whole[:, :length])
        assert part.last.shape == (2, max(0, length - 1) // 8)
