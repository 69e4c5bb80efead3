"""Products of per-token decays, from their logs.

Sums run over exactly the tokens of each product: differences of one running sum would lose the
small decays that follow a strong one. A decay of exactly zero (a log of -inf) may be given.
"""

from typing import Any

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
    reads: Float[Array, "r m k"], keys: Float[Array, "w m k"], log_decay: Float[Array, "m k"]
) -> Float[Array, "r w m m"]:
    """Returns A[., ., t, j] = sum over c of reads[., t, c] keys[., j, c] P[t, j, c].

    P[t, j] is the product of decay_i over j < i <= t, and zero where j > t. Blocks double in size,
    from single tokens. Between the halves of a block the product is split where they meet, so that
    no factor exceeds one, however strong the decays, and every step is a matrix product. Factors
    are computed once for all reads and writes.

    Args:
      reads: what reads.
      keys: what was written.
      log_decay: logs of the decays, <= 0.
    """
    log_decay = jnp.maximum(log_decay, _ZERO)
    if whole_matrices():
        return _channel_scores_in_whole(reads, keys, log_decay)
    size = len(log_decay)
    filled = 1 << (size - 1).bit_length()
    by_token = jnp.moveaxis(reads, 0, 1), jnp.moveaxis(keys, 0, 1)
    reads, keys, since = (
        jnp.pad(x, [(0, filled - size)] + [(0, 0)] * (x.ndim - 1)) for x in (*by_token, log_decay)
    )
    to_end = jnp.zeros_like(since)
    scores = jnp.einsum("trk,twk->trw", reads, keys)[:, None, :, None]

    def halves(rows: Array, *rest: int) -> tuple[Array, Array]:
        """The first and the second halves of blocks."""
        pairs = rows.reshape(len(scores) // 2, 2, -1, *rest, rows.shape[-1])
        return pairs[:, 0], pairs[:, 1]

    while len(scores) > 1:
        (first, second), (to_middle, rest) = halves(since), halves(to_end)
        readers = halves(reads, reads.shape[1])[1] * jnp.exp(second)[:, :, None]
        writers = halves(keys, keys.shape[1])[0] * jnp.exp(to_middle)[:, :, None]
        corner = jnp.einsum("nirk,njwk->nirjw", readers, writers)
        upper = jnp.concatenate([scores[::2], jnp.zeros_like(corner)], axis=3)
        lower = jnp.concatenate([corner, scores[1::2]], axis=3)
        since = jnp.stack([first, first[:, -1:] + second], axis=1)
        to_end = jnp.stack([to_middle + second[:, -1:], rest], axis=1)
        scores = jnp.concatenate([upper, lower], axis=1)
    return jnp.transpose(scores[0, :size, :, :size], (1, 3, 0, 2))


def _channel_scores_in_whole(
    reads: Float[Array, "r m k"], keys: Float[Array, "w m k"], log_decay: Float[Array, "m k"]
) -> Float[Array, "r w m m"]:
    """``channel_scores`` of all blocks of a size at once, in products of whole matrices."""
    size = len(log_decay)
    levels = range((size - 1).bit_length())
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))

    def between(level: int) -> Bool[Array, "m m"]:
        """Whether a decay lies between the middle and a token that reads, or one that is read."""
        second = (row >> level) & 1 == 1
        return (row >> level == column >> level) & jnp.where(second, column <= row, column > row)

    def is_corner(level: int) -> Bool[Array, "m m"]:
        return (row >> level == (column >> level) + 1) & ((row >> level) & 1 == 1)

    factors: Any = ()
    if levels:
        sums = jnp.concatenate([between(level).astype(log_decay.dtype) for level in levels])
        summed = jnp.matmul(sums, log_decay, precision="highest")
        factors = jnp.exp(summed).reshape(-1, *log_decay.shape)

    def products(factor: Array | float, where: Bool[Array, "m m"]) -> Float[Array, "r w m m"]:
        of = [[jnp.matmul(x * factor, (y * factor).T) for y in keys] for x in reads]
        return jnp.where(where, jnp.stack([jnp.stack(row) for row in of]), 0.0)

    scores = products(1.0, row == column)
    for level in levels:
        scores += products(factors[level], is_corner(level))
    return scores
