"""How well a router finds segments of one size, and segments that follow the content."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import memcache_jax as mc
from experiments._capacity import quality
from memcache_jax.engine.borders import find_borders
from memcache_jax.engine.one_pass import find_all_borders
from memcache_jax.engine.run import writing
from memcache_jax.engine.types import Tokens


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


def draw_values(seed: int, keys: np.ndarray, topic: np.ndarray, mapped: bool) -> np.ndarray:
    """Random values (trials, pairs, d) of norm one, or if ``mapped`` keys rotated by topic."""
    random = np.random.default_rng(seed)
    if mapped:
        shape = len(keys), int(topic.max()) + 1, keys.shape[-1], keys.shape[-1]
        rotations = np.linalg.qr(random.standard_normal(shape))[0]
        each = np.stack([rows[of] for rows, of in zip(rotations, topic, strict=True)])
        values = np.einsum("btk,btkv->btv", keys, each)
    else:
        values = random.standard_normal(keys.shape)
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
    return values.astype(np.float32)


def measure_recall(
    segmentation: mc.Segmentation | None,
    keys: np.ndarray,
    values: np.ndarray,
    topic: np.ndarray,
    asked: np.ndarray,
    beta: float,
    temperature: float,
) -> dict[str, float]:
    """Recall by ``DeltaNet`` and GRM after all pairs, and the number of segments.

    Args:
      segmentation: where segments end; None to end them where topics do.
      keys: (trials, pairs, d).
      values: the same.
      topic: of each pair.
      asked: the pairs that questions ask for, (trials, questions).
      beta: the step size of the delta rule.
      temperature: of connectors, as in ``_capacity.measure_memory``.
    """
    trials, pairs, _ = keys.shape
    questions, border, segment = asked.shape[1], {}, topic
    if segmentation is not None:
        segment = segments_of(segmentation, keys, values, beta)
    else:
        segmentation = mc.Adaptive(1, pairs + questions, by="scores")
        ends = np.pad(np.diff(topic, axis=1) > 0, ((0, 0), (0, 1 + questions)))
        border["border"] = jnp.asarray(np.where(ends, 1.0, -1.0)[..., None], jnp.float32)

    def rows(x: np.ndarray, of_questions: np.ndarray) -> Any:
        """The pairs, then the questions, as rows (b, t, 1, d)."""
        return jnp.asarray(np.concatenate([x, of_questions], axis=1)[:, :, None])

    every = np.arange(trials)[:, None]
    # Questions write nothing, and have the last pair's key: they add no surprise.
    same = np.repeat(keys[:, -1:], questions, axis=1)
    query, key = rows(keys, keys[every, asked]), rows(keys, same)
    value, writes = rows(values, 0 * same), np.arange(pairs + questions) < pairs
    rates = jnp.broadcast_to(jnp.asarray(beta * writes, jnp.float32)[None, :, None], key.shape[:3])
    y = mc.memory_caching(
        *(query, key, value, temperature * query),
        memory=mc.memories.DeltaNet(),
        controls=dict(beta=rates),
        aggregation=mc.GRM(),
        segmentation=segmentation,
        **border,
    )
    y = np.asarray(y)[:, None, pairs:, 0]
    recall = quality(y, values, asked[:, None])["recall"][0]
    return dict(recall=recall, segments=float(segment[:, -1].mean() + 1))


def segments_of(
    segmentation: mc.Segmentation, keys: np.ndarray, values: np.ndarray | None = None, beta: Any = 1
) -> np.ndarray:
    """The number of each pair's segment, (trials, pairs).

    Borders by errors are those of ``DeltaNet`` with these values and this beta.
    """
    trials, pairs, _ = keys.shape
    if not isinstance(segmentation, mc.Adaptive):
        segment = np.repeat(np.cumsum(segmentation.plan(pairs).begins) - 1, segmentation.size)
        return np.broadcast_to(segment[:pairs], (trials, pairs))
    key = jnp.asarray(keys)[:, None]
    if segmentation.by != "errors":
        return np.asarray(find_borders(segmentation, key, None).of_tokens(pairs))
    assert values is not None
    rates = dict(beta=jnp.full(key.shape[:3], beta, key.dtype))
    tokens = Tokens(key, key, jnp.asarray(values)[:, None], key, rates)
    how = writing(mc.memories.DeltaNet(), mc.GRM(), tokens, {}, None)
    borders = find_all_borders(segmentation, tokens, {}, None, how, "independent")
    return np.asarray(borders.of_tokens(pairs))


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
