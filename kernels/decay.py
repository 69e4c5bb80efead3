"""Products of per-token decays, from their logs.

Sums run over exactly the tokens of each product: differences of one running sum would lose the
small decays that follow a strong one. A decay of exactly zero (a log of -inf) may be given.
"""

import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Bool, Float
from memcache_jax.kernels.triangular import whole_matrices

_ZERO = -1e6  # the log of a decay that is as good as zero, in any sum


def running_sum(
    x: Float[Array, "m ..."], same: Bool[Array, "m m"] | None = None
) -> Float[Array, "m ..."]:
    """Cumulative sum of few rows, as the matrix product that every backend does fast.

    With ``same``, over those of a row's own document.
    """
    sums = _causal(x.shape[0], same).astype(x.dtype)
    return jnp.tensordot(sums, x, axes=1, precision="highest")


def _causal(size: int, same: Bool[Array, "m m"] | None) -> Bool[Array, "m m"]:
    """Whether row t sees row j: j <= t, and both of one document."""
    causal = jnp.tri(size, dtype=bool)
    return causal if same is None else causal & same


def pairwise_sums(log_decay: Float[Array, "m *k"]) -> Float[Array, "m m *k"]:
    """Returns P[t, j] = sum over j < i <= t of log_decay_i; zero where j >= t."""
    size = log_decay.shape[0]
    below = jnp.tri(size, k=-1, dtype=bool).reshape(size, size, *[1] * (log_decay.ndim - 1))
    return running_sum(jnp.where(below, jnp.maximum(log_decay, _ZERO)[:, None], 0.0))


def decay_matrix(
    log_decay: Float[Array, "m"], same: Bool[Array, "m m"] | None = None
) -> Float[Array, "m m"]:
    """Returns D[t, j] = prod over j < i <= t of exp(log_decay_i); zero where j > t.

    Args:
      log_decay: logs of the decays, <= 0.
      same: whether two tokens are of one document; zero where not.
    """
    causal = _causal(log_decay.shape[0], same)
    return jnp.where(causal, jnp.exp(pairwise_sums(log_decay)), 0.0)


def start_decay(
    log_decay: Float[Array, "m *k"], same: Bool[Array, "m m"] | None = None
) -> Float[Array, "m *k"]:
    """Returns the product of the decays up to each token, its own included.

    With ``same``, as in ``decay_matrix``, only of those of its document.
    """
    return jnp.exp(running_sum(jnp.maximum(log_decay, _ZERO), same))


def end_decay(log_decay: Float[Array, "m *k"]) -> Float[Array, "m *k"]:
    """Returns the product of the decays after each token."""
    if whole_matrices():
        later = jnp.tri(len(log_decay), k=-1, dtype=log_decay.dtype).T
        return jnp.exp(jnp.tensordot(later, jnp.maximum(log_decay, _ZERO), 1, precision="highest"))
    after = jnp.pad(log_decay[1:], [(0, 1)] + [(0, 0)] * (log_decay.ndim - 1))
    return jnp.flip(start_decay(jnp.flip(after, 0)), 0)


def channel_scores(
    x: Float[Array, "m k"], key: Float[Array, "m k"], log_decay: Float[Array, "m k"]
) -> Float[Array, "m m"]:
    """Returns A[t, j] = sum over c of x[t, c] key[j, c] prod over j < i <= t of decay[i, c].

    Blocks double in size, from single tokens. Between the halves of a block the product is split
    where they meet, so that no factor exceeds one however strong the decays, and all is matrix
    products.

    Args:
      x: what reads.
      key: what was written.
      log_decay: logs of the decays, <= 0.
    """
    if whole_matrices():
        return _channel_scores_in_whole(x, key, jnp.maximum(log_decay, _ZERO))
    size, width = x.shape
    filled = 1 << (size - 1).bit_length()
    x, key, since = (
        jnp.pad(rows, ((0, filled - size), (0, 0)))
        for rows in (x, key, jnp.maximum(log_decay, _ZERO))
    )
    to_end = jnp.zeros_like(since)
    scores = jnp.vecdot(x, key)[:, None, None]

    def halves(rows: Array) -> tuple[Array, Array]:
        """The first and the second halves of blocks."""
        pairs = rows.reshape(len(scores) // 2, 2, -1, width)
        return pairs[:, 0], pairs[:, 1]

    while len(scores) > 1:
        (first, second), (to_middle, rest) = halves(since), halves(to_end)
        readers, writers = halves(x)[1] * jnp.exp(second), halves(key)[0] * jnp.exp(to_middle)
        corner = jnp.einsum("wik,wjk->wij", readers, writers)
        upper = jnp.concatenate([scores[::2], jnp.zeros_like(corner)], axis=2)
        lower = jnp.concatenate([corner, scores[1::2]], axis=2)
        since = jnp.stack([first, first[:, -1:] + second], axis=1)
        to_end = jnp.stack([to_middle + second[:, -1:], rest], axis=1)
        scores = jnp.concatenate([upper, lower], axis=1)
    return scores[0, :size, :size]


def _channel_scores_in_whole(
    x: Float[Array, "m k"], key: Float[Array, "m k"], log_decay: Float[Array, "m k"]
) -> Float[Array, "m m"]:
    """``channel_scores`` of all blocks of a size at once, in products of whole matrices."""
    shape = (len(x), len(x))
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))

    def sums(of: Bool[Array, "m m"]) -> Float[Array, "m k"]:
        return jnp.matmul(of.astype(log_decay.dtype), log_decay, precision="highest")

    scores = jnp.where(row == column, jnp.sum(x * key, axis=1)[:, None], 0.0)
    for level in range((len(x) - 1).bit_length()):
        block_row, block_column = row >> level, column >> level
        same = block_row == block_column
        readers = x * jnp.exp(sums(same & (column <= row)))  # decays from the middle to a reader
        writers = key * jnp.exp(sums(same & (column > row)))  # and from a writer to the middle
        is_corner = (block_row == block_column + 1) & (block_row & 1 == 1)
        scores += jnp.where(is_corner, jnp.matmul(readers, writers.T), 0.0)
    return scores
