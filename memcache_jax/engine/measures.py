"""Measures of blocks, by which ``Adaptive`` decides where segments end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int, State
from memcache_jax.engine.documents import block_sums
from memcache_jax.engine.types import Blocks, Rows, Writing
from memcache_jax.engine.write import write_chunk
from memcache_jax.memories.base import first_of_documents


class Measure(NamedTuple):
    """The measure of each block, which may depend on where segments ended before it.

    Attributes:
      first: the carry of the first block.
      blocks: the blocks, arrays (n, b, ...).
      step: given a carry, a block, and whether a segment begins with the block in each row (b,),
        returns the next carry and the block's measure (b, ...).
    """

    first: Any
    blocks: Any
    step: Callable[[Any, Any, Bool[Array, "b"]], tuple[Any, Array]]


def _fixed(measures: Float[Array, "n b *measure"]) -> Measure:
    """Measures that depend on no border."""
    return Measure((), measures, lambda carry, measure, begins: (carry, measure))


def by_keys(key: Float[Array, "b h n c k"], document: Int[Array, "b n c"] | None) -> Measure:
    """The sum of each block's keys, over the tokens of its last document."""
    sums = key.sum(axis=3) if document is None else block_sums(key, document).keys
    return _fixed(jnp.moveaxis(sums, 2, 0))


def by_scores(border: Float[Array, "b h n c"], document: Int[Array, "b n c"] | None) -> Measure:
    """The mean of each block's logits, over heads and the tokens of its last document."""
    return _fixed(_mean(border.mean(axis=1), _of_last_document(border, document)).T)


def by_errors(
    how: Writing,
    blocks: Blocks,
    initial: State,
    document: Int[Array, "b n c"] | None,
    carries: bool,
) -> Measure:
    """The mean error of each block, over heads and the tokens of its last document.

    Args:
      how: the rule.
      blocks: the tokens, cut with their documents.
      initial: the states before the first token, (b, h, ...).
      document: the document of each token; None without packed documents.
      carries: whether segments continue from each other.
    """
    rows = blocks.rows
    shape = (*blocks.tokens.key.shape[:1], *blocks.tokens.key.shape[2:4])
    ours = jnp.moveaxis(_of_last_document(blocks.tokens.key[..., 0], document), 1, 0)
    assert rows.bad is not None
    bad = jnp.moveaxis(rows.bad.any(axis=1).reshape(shape), 1, 0)
    rows = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), rows._replace(bad=None, came=None))
    chunk = jax.vmap(jax.vmap(lambda *args: errors_of_chunk(how, *args)))

    def step(carry: tuple, xs: tuple, begins: Bool[Array, "b"]) -> tuple[tuple, Array]:
        state, spoilt = carry
        rows, ours, bad = xs
        if not carries:
            state = jax.tree.map(
                lambda new, old: jnp.where(begins.reshape(-1, *[1] * (old.ndim - 1)), new, old),
                *(initial, state),
            )
            spoilt &= ~begins
        if rows.begun is not None:
            spoilt &= ~(rows.begun > 0).any(axis=(1, 2, 3))
        chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), rows)
        state, errors = lax.scan(lambda x, rows: chunk(x, x, initial, rows), state, chunks)
        errors = jnp.moveaxis(errors, 0, 2).reshape(*errors.shape[1:3], -1).mean(axis=1)
        # A non-finite token is zero here; in the memory it spoils what comes after.
        unknown = spoilt | (bad & ours).any(axis=1)
        spoilt = unknown if how.memory.accumulates else bad[:, -1]
        return (state, spoilt), jnp.where(unknown, jnp.nan, _mean(errors, ours))

    none = jnp.zeros_like(ours[0, :, 0])
    return Measure((initial, none), (rows, ours, bad), step)


def errors_of_chunk(
    how: Writing, state: State, anchor: State, initial: State, rows: Rows
) -> tuple[State, Float[Array, "m"]]:
    """Writes tokens (m, ...) of one chunk of one memory; measures the error before each write.

    Args:
      how: the rule.
      state: the state before the first of them.
      anchor: the state with which the chunk began.
      initial: the state before a document's first token.
      rows: the tokens.

    Returns:
      The state after them, and |v - M(k)|^2 / |v|^2 of each.
    """
    memory, key, value = how.memory, rows.key, rows.value
    next_key = jnp.roll(key, -1, axis=0)
    how = how._replace(needs=("reads",))
    with jax.default_matmul_precision("highest"):
        end, kept = write_chunk(how, state, anchor, rows._replace(query=next_key), initial)
        if memory.gradient_chunk:
            recalled = memory.read(memory.matrices(anchor), key)
        else:
            first = memory.read(memory.matrices(state), key[:1])
            recalled = jnp.concatenate([first, kept["reads"][:-1]])
        if rows.begun is not None:
            anew = rows.begun.astype(jnp.int32)
            anew = anew > 0 if memory.gradient_chunk else first_of_documents(anew)
            recalled = jnp.where(
                anew[:, None], memory.read(memory.matrices(initial), key), recalled
            )
    return end, relative_error(value, recalled)


def relative_error(value: Float[Array, "*m v"], recalled: Float[Array, "*m v"]) -> Array:
    """|v - M(k)|^2 / |v|^2, 0 where v = 0."""
    square, error = jnp.sum(value**2, axis=-1), jnp.sum((value - recalled) ** 2, axis=-1)
    return jnp.where(square == 0, 0 * error, error / jnp.where(square == 0, 1, square))


def _of_last_document(
    like: Float[Array, "b h n c"], document: Int[Array, "b n c"] | None
) -> Bool[Array, "b n c"]:
    """The tokens of their block's last document."""
    if document is None:
        return jnp.ones_like(like[:, 0], bool)
    return document == document[:, :, -1:]


def _mean(x: Float[Array, "*n c"], where: Bool[Array, "*n c"]) -> Float[Array, "*n"]:
    return jnp.sum(x, axis=-1, where=where) / where.sum(axis=-1)
