"""How many pairs memories recall without training: what is written, asked for and measured."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import memcache_jax as mc
from memcache_jax._typing import Array, Float

NO_MOMENTUM = -30.0
"""The log of a momentum that is zero in float32."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A write rule with the coefficients of tokens that write a pair.

    Nothing decays. Tokens that only ask have key and value zero, so that they write nothing.

    Attributes:
      memory: the rule.
      controls: constants; ``"key"`` stands for the token's key itself.
    """

    memory: mc.memories.Memory
    controls: Mapping[str, float | str]

    def coefficients(self, key: Float[Array, "b t h k"]) -> dict[str, Array]:
        """The controls of tokens with these keys."""
        channels, made = {"k": key.shape[3:], "v": key.shape[3:]}, {}
        for name, control in self.memory.controls.items():
            if name in self.controls:
                value = self.controls[name]
                shape = key.shape[:3] + channels.get(control.axes[-1], ())
                shape = key.shape[2:3] if control.axes == "h" else shape
                made[name] = key if isinstance(value, str) else jnp.full(shape, value, key.dtype)
        return made


def rules() -> dict[str, Rule]:
    """Every rule but ``Vector``, which keeps one value and ignores queries, by its name.

    Delta rules write with beta = 0.2, and RWKV-7 is that rule with kappa = k. With beta = 1 the
    newest pair is exact, and older ones are lost sooner. SWLA gives half of a pair's weight to the
    token after it. Deep memories take a step after each token, the longest of those tried at which
    they do not diverge on 64 pairs of d = 16.
    """
    m = mc.memories
    return {
        "LinearAttention": Rule(m.LinearAttention(), {}),
        "RetNet": Rule(m.RetNet(), dict(log_gamma=0.0)),
        "SSD": Rule(m.SSD(), dict(log_alpha=0.0, lam=1.0)),
        "GLA": Rule(m.GLA(), dict(log_alpha=0.0)),
        "SWLA": Rule(m.SWLA(), dict(log_alpha=0.0, beta=0.5, lam=0.5)),
        "DeltaNet": Rule(m.DeltaNet(), dict(beta=0.2)),
        "GatedDeltaNet": Rule(m.GatedDeltaNet(), dict(log_alpha=0.0, beta=0.2)),
        "KDA": Rule(m.KDA(), dict(log_alpha=0.0, beta=0.2)),
        "GDN2": Rule(m.GDN2(), dict(log_alpha=0.0, erase=0.2, write=0.2)),
        "RWKV7": Rule(m.RWKV7(), dict(log_w=0.0, a=0.2, kappa="key")),
        "DLA": Rule(m.DLA(chunk_size=1), dict(eta=1.0)),
        "Titans": Rule(m.Titans(chunk_size=1), dict(log_alpha=0.0, log_beta=NO_MOMENTUM, eta=0.2)),
    }


def draw_pairs(
    seed: int, trials: int, pairs: int, dim: int, correlation: float, topic: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values (trials, pairs, dim) of norm one.

    Args:
      seed: of the random numbers.
      trials: independent sets of pairs.
      pairs: of a set.
      dim: of keys and of values.
      correlation: the mean product rho of two keys of one topic, k = sqrt(rho) c + sqrt(1 - rho) z
        with z at a right angle to the topic's c. Zero for keys that have no topic.
      topic: pairs in a row that share c; 0 for all of them.
    """
    random = np.random.default_rng(seed)

    def units(*shape: int) -> np.ndarray:
        x = random.standard_normal((*shape, dim))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    keys, values = units(trials, pairs), units(trials, pairs)
    if correlation:
        shared = np.repeat(units(trials, -(-pairs // (topic or pairs))), topic or pairs, axis=1)
        shared = shared[:, :pairs]
        keys -= (keys * shared).sum(axis=-1, keepdims=True) * shared
        keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
        keys = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * keys
    return keys.astype(np.float32), values.astype(np.float32)


def linear_snr(pairs: Any, dim: int, correlation: float = 0.0) -> Any:
    """The signal-to-noise ratio of M = sum_j v_j k_j^T, a linear memory, asked for one of its keys.

    M k_i = v_i + sum_{j != i} <k_j, k_i> v_j. Values are random and of norm one, so that the noise
    has the power of K - 1 squared products of keys: SNR = 1 / ((K - 1) E<k_j, k_i>^2). For random
    keys the mean is 1 / d: SNR = d / (K - 1). With a topic that all share it is
    rho^2 + (1 - rho)^2 / (d - 1). Only orthogonal keys, at most d, are free of noise (Sec. 4.1 of
    arXiv:2102.11174). A router that always finds the right one of several memories leaves only the
    noise of that segment: K is then the segment's size.

    Args:
      pairs: K, at least 2.
      dim: d, of a key.
      correlation: rho, as for ``draw_pairs`` with one topic.
    """
    overlap = correlation**2 + (1 - correlation) ** 2 / (dim - 1) if correlation else 1 / dim
    return 1 / ((pairs - 1) * overlap)


def initial_weights(memory: mc.memories.Memory, heads: int, dim: int) -> dict[str, Array]:
    """Random weights of a deep memory, of variance 1 / fan-in, and a hundredth of that in W1."""
    made = {}
    for i, (name, shape) in enumerate(memory.weight_shapes(dim, dim).items()):
        scale = (0.1 if name == "W1" else 1.0) / math.sqrt(shape[1])
        made[name] = scale * jax.random.normal(jax.random.key(i), (heads, *shape))
    return made


def measure_memory(
    rule: Rule,
    aggregation: mc.Aggregation,
    segment: int | None,
    keys: np.ndarray,
    values: np.ndarray,
    asked: np.ndarray,
    *,
    temperature: float,
) -> dict[str, list]:
    """Writes pairs and asks for some of all so far, again and again, in one sequence.

    Args:
      rule: how they are written.
      aggregation: how cached states are read. Tokens that ask have a key of zero, which adds
        nothing with ``pooling="sum"``. With several keys per state, questions are asked at the end
        of each span, and those of the last span count. With ``exact`` tokens, whose keys have no
        other scale, pooling is ``"mean"``, each question has a sequence of its own, and a state one
        key.
      segment: pairs in a segment; None for one memory of all.
      keys: (trials, pairs, d).
      values: the same.
      asked: from ``draw_questions``. Where there are segments, each ends after one of its points.
      temperature: of content gates: connectors are the queries times this, scaled to make pooled
        keys the means of the pairs of full segments, or spans.

    Returns:
      By name, at each point: ``recall``, the share of reads that are nearest to the value asked
      for among all values so far, by angle; ``snr``; and ``bytes`` of states, pooled keys and exact
      tokens.
    """
    trials, pairs, dim = keys.shape
    number, questions = asked.shape[1:]
    piece = pairs // number
    if segment is not None and segment != piece:
        raise ValueError(f"segments must end where pairs are asked for, got {segment} and {piece}")
    spans = aggregation.num_keys

    asking = 1 if aggregation.exact else questions

    def interleave(of_pairs: np.ndarray, of_questions: np.ndarray) -> np.ndarray:
        """Rows (b, t, trials, d), the pairs of a span and their ``asking`` questions in turn."""
        of_questions = of_questions.reshape(trials, number, -1, asking, dim)
        of_questions = np.moveaxis(of_questions, 2, 0)[:, :, :, None]
        of_questions = np.repeat(of_questions, spans, axis=3)
        of_pairs = of_pairs.reshape(1, trials, number, spans, piece // spans, dim)
        of_pairs = np.broadcast_to(of_pairs, (len(of_questions), *of_pairs.shape[1:]))
        rows = np.concatenate([of_pairs, of_questions], axis=4)
        return np.moveaxis(rows.reshape(len(rows), trials, -1, dim), 1, 2)

    every = np.arange(trials)[:, None, None]
    queries = keys[every, asked]
    nothing = np.zeros_like(queries)
    query, key = (jnp.asarray(interleave(keys, x)) for x in (queries, nothing))
    tokens = piece + spans * asking
    pooled = tokens if aggregation.pooling == "mean" else spans
    weights = initial_weights(rule.memory, trials, dim)
    y = mc.memory_caching(
        *(
            query,
            key,
            jnp.asarray(interleave(values, nothing)),
            temperature * pooled / piece * query,
        ),
        memory=rule.memory,
        controls=rule.coefficients(key),
        weights=weights,
        aggregation=aggregation,
        segmentation=mc.Constant(tokens if segment else number * tokens),
    )
    y = np.moveaxis(np.asarray(y), 2, 1).reshape(-1, trials, number, tokens, dim)
    y = np.moveaxis(y[..., -asking:, :], 0, 2).reshape(trials, number, questions, dim)
    state, cached = _bytes_of_states(rule.memory, weights, trials, (spans, dim))
    cached += 4 * aggregation.exact * 2 * dim
    return quality(y, values, asked) | {
        "bytes": [state + (i if segment else 0) * cached for i in range(number)]
    }


def _bytes_of_states(
    memory: mc.memories.Memory, weights: dict[str, Array], heads: int, keys: tuple[int, int]
) -> tuple[int, int]:
    """Bytes of a head's live state, and of a cached one with its pooled keys of so many numbers."""

    def states(weights: dict[str, Array]) -> Any:
        live = memory.init(weights, keys[1], keys[1], jnp.float32)
        return live, (memory.matrices(live), jnp.zeros(keys))

    shapes = jax.eval_shape(jax.vmap(states, axis_size=heads), weights)
    live, cached = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(x)) for x in shapes)
    return live // heads, cached // heads


def measure_attention(
    keys: np.ndarray, values: np.ndarray, asked: np.ndarray, *, temperature: float
) -> dict[str, list]:
    """``measure_memory`` of softmax attention over all pairs so far."""
    trials, pairs, dim = keys.shape
    counts = points(pairs, asked)
    queries = keys[np.arange(trials)[:, None, None], asked]
    weights = np.exp(temperature * np.einsum("hnqk,htk->hnqt", queries, keys))
    weights *= np.arange(pairs) < counts[:, None, None]
    y = np.einsum("hnqt,htv->hnqv", weights / weights.sum(axis=-1, keepdims=True), values)
    return quality(y, values, asked) | {"bytes": (counts * 4 * 2 * dim).tolist()}


def points(pairs: int, asked: np.ndarray) -> np.ndarray:
    """The numbers of pairs after which some are asked for."""
    return np.arange(1, asked.shape[1] + 1) * (pairs // asked.shape[1])


def draw_questions(seed: int, trials: int, pairs: int, every: int, questions: int) -> np.ndarray:
    """Which pairs are asked for after each ``every`` of them, (trials, points, questions)."""
    if pairs % every:
        raise ValueError(f"{every} must divide the number of pairs, got {pairs}")
    random = np.random.default_rng(seed)
    counts = np.arange(every, pairs + 1, every)
    drawn = [random.integers(0, count, (trials, questions)) for count in counts]
    return np.stack(drawn, axis=1)


def quality(y: np.ndarray, values: np.ndarray, asked: np.ndarray) -> dict[str, list]:
    """Recall and signal-to-noise of reads y (trials, points, questions, d), over all trials.

    y_i = s v_i + noise with one s for all, the mean of <y_i, v_i>: the ratio of s^2 to the noise's
    mean square.
    """
    trials, pairs, _ = values.shape
    nearest = np.einsum("hnqv,htv->hnqt", y, values)
    there = np.arange(pairs) < points(pairs, asked)[:, None, None]
    right = np.argmax(np.where(there, nearest, -np.inf), axis=-1) == asked
    wanted = values[np.arange(trials)[:, None, None], asked]
    signal = np.mean(np.sum(y * wanted, axis=-1), axis=(0, 2))
    noise = np.mean(np.sum((y - signal[:, None, None] * wanted) ** 2, axis=-1), axis=(0, 2))
    snr = signal**2 / np.maximum(noise, 1e-12)
    return dict(recall=right.mean(axis=(0, 2)).tolist(), snr=snr.tolist())


def router_hits(
    keys: np.ndarray,
    asked: np.ndarray,
    top_k: int,
    num_keys: int = 1,
    last: bool = False,
    tree: mc.Tree | None = None,
) -> list[float]:
    """The share of questions for which SSC reads the state that holds the pair, at each point.

    An oracle's is 1. The live memory, which every token reads, holds the pairs of its segment.

    Args:
      keys: (trials, pairs, d).
      asked: from ``draw_questions``, at the end of each segment.
      top_k: states that a token reads.
      num_keys: pooled keys of a state.
      last: whether to take the last point alone.
      tree: the tree that the router searches; None to compare all pooled keys.
    """
    trials, pairs, dim = keys.shape
    number, segment = asked.shape[1], pairs // asked.shape[1]
    live = np.arange(number)[-1:] if last else np.arange(number)
    asked, live = asked[:, live], live[:, None, None]
    pooled = keys.reshape(trials, number * num_keys, segment // num_keys, dim).mean(axis=2)
    queries = keys[np.arange(trials)[:, None, None], asked]
    relevance = np.einsum("hnqk,hsk->hnqs", queries, pooled)
    relevance = relevance.reshape(*relevance.shape[:3], number, num_keys).max(axis=-1)
    relevance = np.where(np.arange(number) < live, relevance, -np.inf)
    if tree is None:
        best = np.argsort(-relevance, axis=-1, kind="stable")[..., :top_k]
    else:
        best = np.asarray(tree.chosen(top_k, jnp.asarray(relevance)))
    own = asked // segment
    found = (own == live[..., 0]) | (best == own[..., None]).any(axis=-1)
    return found.mean(axis=(0, 2)).tolist()


def step_seconds(kind: mc.SSC, states: int, dim: int, steps: int) -> float:
    """Processor seconds per token of a stream with so many cached states, the minimum of five runs.

    Four heads of ``dim``. Segments have one token and values one channel, so that the router takes
    nearly all of the time.
    """
    how: dict[str, Any] = dict(
        memory=mc.memories.LinearAttention(), aggregation=kind, segmentation=mc.Constant(1)
    )
    cache = mc.init_cache(1, 4, dim, 1, **how, max_segments=states + 16)
    rows = jax.random.normal(jax.random.key(0), (1, states, 4, dim))

    def take(rows: Array, cache: mc.Cache) -> tuple[Array, mc.Cache]:
        return mc.extend(cache, rows, rows, rows[..., :1], 10 * rows)

    _, cache = jax.jit(take)(rows, cache)
    step, least = jax.jit(take), math.inf
    y, _ = jax.block_until_ready(step(rows[:, :1], cache))
    for _ in range(5):
        begin = time.process_time()
        for _ in range(steps):
            y, _ = step(rows[:, :1], cache)
        jax.block_until_ready(y)
        least = min(least, (time.process_time() - begin) / steps)
    return least
