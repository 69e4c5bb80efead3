"""Numbers that are not finite spoil what depends on them, and nothing else.

A chunk is written and read in products over all of its tokens, in which 0 * NaN is NaN. So numbers
that are not finite are set to zero before anything is computed, and what depends on them becomes
NaN by selection: the reads of the tokens from there on, and the states that they leave.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Float, State
from memcache_jax.engine.types import Blocks, Rows, Tokens, Views, Writing
from memcache_jax.kernels.decay import running_sum
from memcache_jax.memories import Memory
from memcache_jax.memories.base import Run


def cleaned(tokens: Tokens) -> tuple[Tokens, Bool[Array, "b h n c"]]:
    """Returns tokens (b, h, n, c, ...) whose writes are finite, and which of them were not.

    Queries and connectors are as they were: they reach no other token.
    """
    bad = jnp.zeros(tokens.key.shape[:4], bool)
    for name, x in dict(key=tokens.key, value=tokens.value, **tokens.controls).items():
        bad |= ~_is_fine(name, x).reshape(*bad.shape, -1).all(axis=-1)
    return with_finite_writes(tokens), bad


def with_finite_writes(tokens: Any) -> Any:
    """Tokens or rows with zeros in place of keys, values and controls that are not finite."""

    def clean(name: str, x: Array) -> Array:
        return jnp.where(_is_fine(name, x), x, 0)

    return tokens._replace(
        key=clean("key", tokens.key),
        value=clean("value", tokens.value),
        controls={name: clean(name, x) for name, x in tokens.controls.items()},
    )


def as_they_came(rows: Rows) -> Rows:
    """The rows before cleaning, in bfloat16 or in the cleaned rows' dtype, without documents."""
    return jax.tree.map(narrow, rows.came, rows._replace(begun=None, bad=None, came=None))


def narrow(x: Array, wide: Array) -> Array:
    """An array as it came if in bfloat16, which kernels read, or else in another's dtype."""
    return x if x.dtype == jnp.bfloat16 else x.astype(wide.dtype)


def reading_queries(how: Writing, blocks: Blocks) -> Float[Array, "b h n c k"]:
    """The queries that read cached states, in the tokens' own dtype for kernels that take it."""
    came = how.implementation == "pallas_tpu" and blocks.rows.came is not None
    if not came or how.needs != ("reads",):
        return blocks.tokens.query
    return as_they_came(blocks.rows).query.reshape(blocks.tokens.query.shape)


def _is_fine(name: str, x: Array) -> Array:
    """Whether numbers are finite, or the logarithm of zero."""
    fine = jnp.isfinite(x)
    return fine | (x == -jnp.inf) if name.startswith("log_") else fine


def composed(memory: Memory, first: Run, then: Run) -> Run:
    """``memory.compose``, in which a first state that is not finite spoils the result by selection.

    The gradient of an unread state is then 0, not 0 * NaN.
    """
    spoilt = jnp.zeros((), bool)
    for x in jax.tree.leaves(first.state):
        spoilt |= jnp.isnan(x).any()
    clean = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), 0, x), first.state)
    run = memory.compose(first._replace(state=clean), then)
    state = jax.tree.map(lambda x: jnp.where(spoilt, jnp.nan, x), run.state)
    return run._replace(state=state)


def spoilt(
    memory: Memory, rows: Rows, restarts: Bool[np.ndarray, "n"]
) -> Bool[Array, "b h n chunks m"] | None:
    """The tokens after which the live memory depends on a non-finite one; None if none does.

    Args:
      memory: the rule.
      rows: as for ``write_blocks``.
      restarts: as for ``write_blocks``.
    """
    bad, begun = rows.bad, rows.begun
    if bad is None or not memory.accumulates:
        return bad
    blocks, size = bad.shape[2], bad.shape[3] * bad.shape[4]
    tokens = bad.reshape(*bad.shape[:3], size)
    restarts = restarts | (np.arange(blocks) == 0)
    if begun is not None:
        before = jnp.pad(begun[..., :-1], [(0, 0)] * 4 + [(1, 0)])
        firsts = np.outer(restarts, np.arange(size) == 0)
        begins = (begun != before).reshape(tokens.shape) | firsts[None, None]
        flat = (x.reshape(*bad.shape[:2], -1) for x in (tokens, begins))
        return _since_the_last(*flat).reshape(bad.shape)
    place = jnp.arange(size)[None, None, None]
    lost = place >= jnp.where(tokens, place, size).min(axis=-1)[..., None]
    if not restarts.all():
        by_block = _since_the_last(lost[..., -1], jnp.asarray(restarts)[None, None])
        before = jnp.pad(by_block[..., :-1], ((0, 0), (0, 0), (1, 0)))
        lost |= (before & ~restarts[None, None])[..., None]
    return lost.reshape(bad.shape)


def spoilt_in_chunk(rows: Rows, before: Float[Array, ""]) -> Float[Array, "m"]:
    """``spoilt`` of the rows (m, ...) of a chunk as they came, as positive numbers.

    Args:
      rows: the rows.
      before: positive if the state before the chunk is spoilt, else zero.
    """
    bad, same = jnp.zeros(len(rows.key), jnp.float32), None
    for name, x in dict(key=rows.key, value=rows.value, **rows.controls).items():
        broken = jnp.where(_is_fine(name, x), 0, jnp.ones_like(bad, shape=x.shape))
        bad = jnp.maximum(bad, broken.max(axis=tuple(range(1, x.ndim))) if x.ndim > 1 else broken)
    if rows.begun is not None:
        same = rows.begun[:, None] == rows.begun[None]
        before = jnp.where(rows.begun == 0, before, 0)
    return before + running_sum(bad, same)


def _since_the_last(
    bad: Bool[Array, "b h t"], begins: Bool[Array, "*bh t"]
) -> Bool[Array, "b h t"]:
    """Whether there was a bad one since the last that begins anew, itself included."""
    place = np.arange(1, bad.shape[-1] + 1)[None, None]
    last_bad, last_begin = (
        lax.cummax(jnp.where(x, place, 0), axis=x.ndim - 1) for x in (bad, begins)
    )
    return (last_bad > 0) & (last_bad >= last_begin)


def spoil(
    memory: Memory, rows: Rows, restarts: Bool[np.ndarray, "n"], ends: State, kept: Views
) -> tuple[State, Views]:
    """Makes the states of spoilt blocks NaN, and notes the spoilt tokens for ``Live``.

    Views that already have ``spoilt`` keep it: kernels return NaN for what spoilt tokens read.
    """
    lost = spoilt(memory, rows, restarts)
    if lost is None:
        return ends, kept

    def of_state(x: Array) -> Array:
        at_end = lost[..., -1, -1]
        return jnp.where(at_end.reshape(*at_end.shape, *[1] * (x.ndim - 3)), jnp.nan, x)

    return jax.tree.map(of_state, ends), ({"spoilt": lost} | kept if kept else {})
