"""Products of per-token decays, from their logs.

Sums run over exactly the tokens of each product: differences of one running sum would lose the
small decays that follow a strong one. A decay of exactly zero (a log of -inf) may be given.
"""

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Bool, Float

_BLOCK = 8  # tokens of a per-channel product that are compared pair by pair
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
    after = jnp.pad(log_decay[1:], [(0, 1)] + [(0, 0)] * (log_decay.ndim - 1))
    return jnp.flip(start_decay(jnp.flip(after, 0)), 0)


def channel_scores(
    x: Float[Array, "m k"],
    key: Float[Array, "m k"],
    log_decay: Float[Array, "m k"],
    *,
    before: bool = False,
) -> Float[Array, "m m"]:
    """Returns A[t, j] = sum over c of x[t, c] key[j, c] prod over j < i <= t of decay[i, c].

    Tokens are compared pair by pair inside blocks of a few; between blocks the product is split at
    the later block's start, so that no factor exceeds one however strong the decays.

    Args:
      x: what reads.
      key: what was written.
      log_decay: logs of the decays, <= 0.
      before: x[t] reads before token t decays and writes: j < t, and the product ends at t - 1.
    """
    size, channels = x.shape
    blocks = -(-size // _BLOCK)

    def split(rows: Array) -> Array:
        rows = jnp.pad(rows, ((0, blocks * _BLOCK - size), (0, 0)))
        return rows.reshape(blocks, _BLOCK, channels)

    x, key, log_decay = split(x), split(key), split(jnp.maximum(log_decay, _ZERO))
    within = jax.vmap(pairwise_sums)(log_decay)  # (w, s, s, k)
    since_start = jax.vmap(running_sum)(log_decay)  # (w, s, k)
    to_end = within[:, -1]
    between = jnp.pad(pairwise_sums(since_start[:, -1]), ((1, 0), (0, 0), (0, 0)))[:-1]
    causal = jnp.tri(_BLOCK, k=-1 if before else 0, dtype=bool)
    if before:
        within = jnp.pad(within, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
        since_start = jnp.pad(since_start, ((0, 0), (1, 0), (0, 0)))[:, :-1]

    near = jnp.where(causal[None, :, :, None], jnp.exp(within), 0.0)
    near = jnp.einsum("aijk,ajk->aijk", near, key)
    near = jnp.einsum("aik,aijk->aij", x, near)
    earlier = jnp.tri(blocks, k=-1, dtype=bool)[:, :, None, None]
    far = jnp.where(earlier, jnp.exp(to_end[None] + between[:, :, None]), 0.0)
    far = jnp.einsum("abjk,bjk->abjk", far, key)
    far = jnp.einsum("aik,abjk->aibj", x * jnp.exp(since_start), far)
    scores = far + jnp.einsum("aij,ab->aibj", near, jnp.eye(blocks, dtype=near.dtype))
    return scores.reshape(blocks * _BLOCK, -1)[:size, :size]
