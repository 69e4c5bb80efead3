"""How well a router finds segments of one size, and segments that follow the content."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import memcache_jax as mc
from memcache_jax.engine.borders import find_borders


def draw_topics(
    seed: int, trials: int, pairs: int, dim: int, correlation: float, lengths: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Keys (trials, pairs, d) whose topic changes after random numbers of pairs, and the topics.

    Args:
      seed: of the random numbers.
      trials: independent sequences.
      pairs: of a sequence.
      dim: of keys.
      correlation: the mean product of two keys of a topic, as in ``_capacity.draw_pairs``.
      lengths: the fewest and the most pairs in a row of one topic.
    """
    random = np.random.default_rng(seed)

    def units() -> np.ndarray:
        x = random.standard_normal((trials, pairs, dim))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    keys, topics = units(), units()
    least, most = lengths
    ends = np.cumsum(random.integers(least, most + 1, (trials, -(-pairs // least))), axis=1)
    topic = np.stack([np.searchsorted(row, np.arange(pairs), side="right") for row in ends])
    shared = np.take_along_axis(topics, topic[:, :, None], axis=1)
    keys -= (keys * shared).sum(axis=-1, keepdims=True) * shared
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    keys = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * keys
    return keys.astype(np.float32), topic


def segments_of(segmentation: mc.Segmentation, keys: np.ndarray) -> np.ndarray:
    """The number of each pair's segment, (trials, pairs)."""
    trials, pairs, _ = keys.shape
    if isinstance(segmentation, mc.Adaptive):
        borders = find_borders(segmentation, jnp.asarray(keys)[:, None], None)
        return np.asarray(borders.of_tokens(pairs))
    segment = np.repeat(np.cumsum(segmentation.plan(pairs).begins) - 1, segmentation.size)
    return np.broadcast_to(segment[:pairs], (trials, pairs))


def found(keys: np.ndarray, segment: np.ndarray, top_k: int = 1) -> float:
    """The share of keys whose own segment is among the ``top_k`` of nearest mean key."""
    shares = []
    for key, own in zip(keys, segment, strict=True):
        pooled = np.stack([key[own == i].mean(axis=0) for i in range(own.max() + 1)])
        best = np.argsort(-key @ pooled.T, axis=-1, kind="stable")[:, :top_k]
        shares.append((best == own[:, None]).any(axis=-1).mean())
    return float(np.mean(shares))


def measure_router(segmentation: Any, keys: np.ndarray, topic: np.ndarray) -> dict[str, float]:
    """How often the most relevant segment is a key's own, and segments in a sequence.

    Args:
      segmentation: where segments end; None for a segment for each topic, which no causal choice
        can reach.
      keys: from ``draw_topics``.
      topic: likewise.
    """
    segment = topic if segmentation is None else segments_of(segmentation, keys)
    return dict(found=found(keys, segment), segments=float(segment[:, -1].mean() + 1))
