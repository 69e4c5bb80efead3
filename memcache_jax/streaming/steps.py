"""The steps in which a call takes its tokens."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.engine.types import Tokens
from memcache_jax.streaming.cache import Cache
from memcache_jax.streaming.loops import fori_loop, while_loop
from memcache_jax.streaming.piece import take_piece


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def taken(
    hands_on: bool, cache: Cache, tokens: Tokens, lengths: Int[Array, "b"]
) -> tuple[Cache, tuple[Float[Array, "b h t v"], Float[Array, "b h t u"] | None]]:
    """The cache after so many tokens (b, h, t, ...) of each row, and as ``take_piece``.

    Loops run while any row needs them, and change the cache in place. They have no reverse mode:
    derivatives are those of ``_taken_in_scans``.
    """
    count = tokens.key.shape[2]
    if count == 1:
        cache, y = take_piece(cache, tokens, lengths > 0, hands_on=hands_on)
        taken = (lengths > 0)[:, None, None, None]
        return cache, jax.tree.map(lambda y: jnp.where(taken, y, 0), y)
    carry = _nothing_taken(cache, tokens, lengths, hands_on)
    rest = _Steps.of_rest(cache, tokens, lengths).exhaust
    if not _has_wholes(cache, count):
        cache, _, y = rest(carry)
    else:
        whole = _Steps.of_wholes(cache, tokens, lengths).exhaust
        # The rest of a chunk that was begun, then whole chunks; then what is left.
        cache, _, y = fori_loop(2, lambda carry: whole(rest(carry)), carry)
    return cache, y


@taken.defjvp
def _(hands_on: bool, primals: tuple, tangents: tuple) -> tuple:
    return jax.jvp(functools.partial(_taken_in_scans, hands_on), primals, tangents)


def _taken_in_scans(
    hands_on: bool, cache: Cache, tokens: Tokens, lengths: Int[Array, "b"]
) -> tuple[Cache, tuple[Float[Array, "b h t v"], Float[Array, "b h t u"] | None]]:
    """As ``taken``, in as many steps as any row may need."""
    count, chunk = tokens.key.shape[2], cache.config.chunk
    carry = _nothing_taken(cache, tokens, lengths, hands_on)
    rest = _Steps.of_rest(cache, tokens, lengths)
    if not _has_wholes(cache, count):
        times = 1 + -(-count // chunk) if rest.in_parts else count
        cache, _, y = _repeat(rest.advance, times, carry)
        return cache, y
    whole = _Steps.of_wholes(cache, tokens, lengths)
    rewind = cache.config.goes_back
    times = 2 + -(-rewind // chunk) if rest.in_parts else chunk - 1 + rewind

    def some(carry: tuple) -> tuple:
        return _repeat(whole.advance, count // chunk, _repeat(rest.advance, times, carry))

    cache, _, y = _repeat(some, 2, carry)
    return cache, y


def _has_wholes(cache: Cache, count: int) -> bool:
    """Whether rows take whole chunks in steps of their own, which keep less than other steps.

    The last tokens, to be taken back, are never in one. A state that is written after every step
    keeps nothing more of a part than of a whole chunk.
    """
    config = cache.config
    same = config.in_parts and not config.defers and not config.goes_back
    return config.chunk > 1 and not same and count >= config.chunk + config.goes_back


def _nothing_taken(
    cache: Cache, tokens: Tokens, lengths: Int[Array, "b"], hands_on: bool
) -> tuple[Cache, Array, tuple[Array, Array | None]]:
    def zeros(width: int) -> Array:
        return jnp.zeros_like(cache.key_sum, shape=(*tokens.key.shape[:3], width))

    aggregation: Any = cache.config.aggregation
    chosen = zeros(2 * aggregation.top_k + 1) if hands_on else None
    y = zeros(tokens.value.shape[-1]), chosen
    return cache, jnp.zeros_like(lengths, jnp.int32), y


def _repeat(advance: Any, times: int, carry: tuple) -> tuple:
    if times == 1:
        return advance(carry)
    return lax.scan(lambda carry, _: (advance(carry), None), carry, length=times)[0]


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Steps that take a call's tokens (b, h, t, ...), of which ``lengths`` count in each row.

    Attributes:
      tokens: the tokens.
      lengths: how many count.
      chunk: tokens in a chunk.
      size: tokens in a step: ``chunk`` for whole chunks, 1 for single tokens, and at most ``chunk``
        with ``in_parts``.
      in_parts: whether rows take all their tokens up to the chunk's end in one step.
      wholes: whether other steps take whole chunks.
    """

    tokens: Any
    lengths: Any
    chunk: int
    size: int
    in_parts: bool = False
    wholes: bool = True

    @classmethod
    def of_wholes(cls, cache: Cache, tokens: Tokens, lengths: Int[Array, "b"]) -> "_Steps":
        """The steps that take whole chunks."""
        chunk = cache.config.chunk
        return cls(tokens, lengths, chunk, chunk)

    @classmethod
    def of_rest(cls, cache: Cache, tokens: Tokens, lengths: Int[Array, "b"]) -> "_Steps":
        """The steps that take other tokens."""
        count, chunk = tokens.key.shape[2], cache.config.chunk
        size, wholes = min(count, chunk), _has_wholes(cache, count)
        if not cache.config.in_parts or chunk == 1:
            return cls(tokens, lengths, chunk, 1, False, wholes)
        # Zeros fill slices that reach past the last token.
        padded = jax.tree.map(
            lambda x: jnp.pad(x, [(0, size if axis == 2 else 0) for axis in range(x.ndim)]), tokens
        )
        return cls(padded, lengths, chunk, size, True, wholes)

    def exhaust(self, carry: tuple) -> tuple:
        """Takes steps until no row has any left."""
        return while_loop(
            lambda carry: self._active(carry).any(),
            lambda carry: self._step(self._active(carry), carry),
            carry,
        )

    def advance(self, carry: tuple) -> tuple:
        """Takes a step in the rows that have one."""
        active = self._active(carry)
        step = functools.partial(self._step, active)
        return lax.cond(active.any(), step, lambda carry: carry, carry)

    def _active(self, carry: tuple) -> Bool[Array, "b"]:
        """The rows that take this step: those at the start of a whole chunk, or the others."""
        cache, done, _ = carry
        last = self.lengths - cache.config.goes_back
        whole = (cache.position % self.chunk == 0) & (done + self.chunk <= last)
        if self.size == self.chunk > 1 and not self.in_parts:
            return whole
        rest = done < self.lengths
        return rest & ~whole if self.wholes else rest

    def _step(self, active: Bool[Array, "b"], carry: tuple) -> tuple:
        cache, done, y = carry
        # At a row's end the slice of a whole chunk is shifted back; the row is then not active.
        piece = jax.tree.map(
            lambda x: jax.vmap(
                lambda x, begin: lax.dynamic_slice_in_dim(x, begin, self.size, axis=1)
            )(x, done),
            self.tokens,
        )
        counts = jnp.full_like(done, self.size)
        if self.in_parts:
            counts = jnp.minimum(self.lengths - done, self.chunk - cache.position % self.chunk)
            counts = counts.astype(done.dtype)
        hands_on, given = y[1] is not None, counts if self.in_parts else None
        cache, out = take_piece(cache, piece, active, given, hands_on)
        ahead = jnp.arange(self.size)[None]
        there = active[:, None] & (ahead < counts[:, None])
        place = jnp.where(there, done[:, None] + ahead, y[0].shape[2])
        put = jax.vmap(lambda y, out, place: y.at[:, place].set(out, mode="drop"))
        y = jax.tree.map(lambda y, out: put(y, out, place), y, out)
        return cache, done + counts * active, y
