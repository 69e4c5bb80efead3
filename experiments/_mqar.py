"""Multi-query associative recall (arXiv:2312.04927): pairs of keys and values, then queries."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from experiments._fit import Questions, Source
from memcache_jax._typing import Array, Float, Int


def zoology(
    length: int,
    pairs: int,
    *,
    vocab_size: int,
    examples: int,
    seed: int,
    power: float = 0.01,
    random_tokens: bool = True,
) -> Questions:
    """Returns the same examples as Zoology's generator, number by number.

    A row is k_1 v_1 ... k_K v_K, then each key once more at position 2 K + 2 gap, whose answer is
    the key's value. Gaps follow a power law. Keys are from [1, V / 2), values from [V / 2, V).

    Args:
      length: tokens of a row.
      pairs: keys and values K.
      vocab_size: number of token ids V.
      examples: rows.
      seed: of ``RandomState``.
      power: a of the law p(gap) ~ gap^(a - 1); 1 is uniform.
      random_tokens: fill the positions between queries with random tokens (Zoology draws them with
        torch, we with NumPy) instead of zeros.

    Raises:
      ValueError: if the sizes do not fit together.
    """
    _check(length, pairs, vocab_size)
    random = np.random.RandomState(seed)
    half = vocab_size // 2

    def draw(begin: int, end: int) -> Int[np.ndarray, "b pairs"]:
        ids = np.arange(begin, end)
        return np.stack([random.choice(ids, pairs, replace=False) for _ in range(examples)])

    keys, values = draw(1, half), draw(half, vocab_size)
    law = _law(length, pairs, power)
    gaps = np.stack([random.choice(len(law), pairs, replace=False, p=law) for _ in range(examples)])
    places = 2 * pairs + 2 * gaps
    tokens = np.zeros((examples, length), np.int64)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(tokens, places, keys, axis=1)
    if random_tokens:
        tokens = np.where(tokens == 0, random.randint(vocab_size, size=tokens.shape), tokens)
    return Questions(*(x.astype(np.int32) for x in (tokens, places, values)))


def on_device(
    length: int,
    pairs: int,
    *,
    vocab_size: int,
    power: float = 0.01,
    random_tokens: bool = True,
) -> Source:
    """Returns a source of examples distributed as in ``zoology``, drawn on the model's device.

    It draws without replacement by taking the largest values of log p + Gumbel noise.

    Args:
      length: tokens of a row.
      pairs: keys and values.
      vocab_size: number of token ids.
      power: of the law of gaps.
      random_tokens: fill the positions between queries with random tokens instead of zeros.

    Raises:
      ValueError: if the sizes do not fit together.
    """
    _check(length, pairs, vocab_size)
    half = vocab_size // 2
    logits = np.log(_law(length, pairs, power)).astype(np.float32)

    def draw(key: Array, logits: ArrayLike) -> Int[Array, "pairs"]:
        noise = jax.random.gumbel(key, jnp.shape(logits))
        return jax.lax.top_k(logits + noise, pairs)[1]

    def source(key: Array) -> Questions:
        of_keys, of_values, of_gaps, of_others = jax.random.split(key, 4)
        keys = 1 + draw(of_keys, np.zeros(half - 1, np.float32))
        values = half + draw(of_values, np.zeros(vocab_size - half, np.float32))
        places = 2 * pairs + 2 * draw(of_gaps, logits)
        tokens = jnp.zeros(length, jnp.int32)
        if random_tokens:
            tokens = jax.random.randint(of_others, (length,), 0, vocab_size)
        context = jnp.stack([keys, values], axis=1).reshape(-1)
        tokens = tokens.at[: 2 * pairs].set(context).at[places].set(keys)
        return Questions(tokens, places, values)

    return source


def _law(length: int, pairs: int, power: float) -> Float[np.ndarray, "gaps"]:
    """Returns the probability of each gap between the pairs and a query, in units of 2 tokens."""
    gaps = np.arange(1, (length - 2 * pairs) // 2 + 1)
    law = power * gaps ** (power - 1)
    return law / law.sum()


def _check(length: int, pairs: int, vocab_size: int) -> None:
    if length % 2 or pairs < 1 or 4 * pairs > length or vocab_size <= length:
        raise ValueError(
            "a row needs an even length, at least one pair, 4 tokens per pair and a vocabulary "
            f"larger than its length; got length={length}, pairs={pairs}, vocab_size={vocab_size}"
        )
    if pairs > vocab_size // 2 - 1:
        raise ValueError(
            f"{pairs} different keys need vocab_size above {2 * pairs + 1}, got {vocab_size}"
        )
