"""The next tokens of a stream."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax import _checks
from memcache_jax._checks import check_arguments
from memcache_jax._eager import compiled
from memcache_jax._typing import Array, Bool, Float, Int, Start
from memcache_jax._varying import alike
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import Aggregation
from memcache_jax.engine.run import full_controls, widen
from memcache_jax.engine.types import Tokens
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Segmentation, exact_chunk
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import check_not_mapped_over
from memcache_jax.streaming.cache import Cache
from memcache_jax.streaming.loops import fori_loop, while_loop
from memcache_jax.streaming.piece import take_piece


def extend(
    cache: Cache,
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    connector: Float[Array, "b t h u"] | None = None,
    *,
    controls: Mapping[str, Array] | None = None,
    border: Float[Array, "b t h"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    memory: Memory | None = None,
    weights: Mapping[str, Array] | None = None,
    aggregation: Aggregation | None = None,
    segmentation: Segmentation | None = None,
    start: Start | None = None,
) -> tuple[Float[Array, "b t h v"], Cache]:
    """Takes the next tokens of a stream, with the outputs that ``memory_caching`` gives them.

    Any split of a sequence into calls gives the outputs of one call over the whole. A call writes
    whole chunks at once and other tokens one by one; deep memories take several tokens of a chunk
    at once. It compiles once per number of tokens. Donate the cache, and none of its arrays is
    copied::

        step = jax.jit(mc.extend, donate_argnums=0)

    Args:
      cache: from ``init_cache`` or an earlier call.
      query: as for ``memory_caching``, and so are the next five.
      key: where a token writes.
      value: what a token writes.
      connector: what a token's gates compare with pooled keys.
      controls: the rule's per-token coefficients.
      border: logits of borders, for ``Adaptive(by="scores")``; they get no gradient in streams.
      lengths: how many of each row's tokens count, from the first on; all by default. Outputs of
        the others are zero.
      memory: what the cache was made for, like the last three; checked if given.
      weights: initial weights of a deep memory for segments that begin from here on, by default
        those that the cache was made with. Pass them if they need gradients after
        ``stop_gradient`` of the cache.
      aggregation: see memory.
      segmentation: see memory.
      start: see memory.

    Returns:
      The outputs, and the cache after the last token.

    Raises:
      ValueError: for a cache of another configuration, arguments that do not fit each other or the
        cache, or more tokens than a row has room for. The cache is then unchanged. Under ``jit``
        room cannot be checked: outputs beyond it are NaN. Any row has room for 2^31 - 1 tokens at
        most, then it must be reset.

    Example:
      >>> import jax, memcache_jax as mc
      >>> q, k, v, u = jax.random.normal(jax.random.key(0), (4, 2, 100, 4, 16))
      >>> rule = dict(memory=mc.memories.LinearAttention(), aggregation=mc.GRM(),
      ...             segmentation=mc.Constant(32))
      >>> cache = mc.init_cache(2, 4, 16, 16, **rule, max_segments=3)
      >>> start, cache = mc.extend(cache, q[:, :90], k[:, :90], v[:, :90], u[:, :90])
      >>> rest, cache = mc.extend(cache, q[:, 90:], k[:, 90:], v[:, 90:], u[:, 90:], **rule)
      >>> whole = mc.memory_caching(q, k, v, u, **rule)
      >>> bool(abs(rest - whole[:, 90:]).max() < 1e-4)
      True
    """
    arguments: dict[str, Any] = dict(
        controls=controls,
        border=border,
        lengths=lengths,
        memory=memory,
        weights=weights,
        aggregation=aggregation,
        segmentation=segmentation,
        start=start,
    )
    return extend_in_group(cache, query, key, value, connector, **arguments)[:2]


def extend_in_group(
    cache: Cache,
    query: Array,
    key: Array,
    value: Array,
    connector: Array | None = None,
    *,
    controls: Mapping[str, Array] | None = None,
    border: Array | None = None,
    lengths: Any = None,
    memory: Memory | None = None,
    weights: Mapping[str, Array] | None = None,
    aggregation: Aggregation | None = None,
    segmentation: Segmentation | None = None,
    start: Start | None = None,
    hands_on: bool = False,
) -> tuple[Array, Cache, Array | None]:
    """As ``extend``; also returns what each token chose, if SSC ``hands_on`` that."""
    _checks.check_instance("cache", cache, Cache, "what mc.init_cache or mc.extend returns")
    config = cache.config
    config.check_same(
        memory=memory, aggregation=aggregation, segmentation=segmentation, start=start
    )
    memory, controls = config.memory, _checks.check_mapping("controls", controls)
    check_arguments(
        *(query, key, value, connector, memory, controls, None),
        *(config.aggregation, config.segmentation, None),
    )
    heads, *dims = cache.sizes
    for name, rows, dim in zip(("key", "value"), (key, value), dims, strict=True):
        axes = f"b, t, h, {name[0]} of the cache"
        _checks.check_shape(name, rows, (*key.shape[:2], heads, dim), axes)
    _checks.check_room(cache.position, key.shape[:2], lengths, config.max_length)
    _checks.check_border(border, config.segmentation, key)
    if weights is not None:
        cache = cache.with_weights(_checks.check_mapping("weights", weights))
    counts = jnp.full(len(query), query.shape[1]) if lengths is None else jnp.asarray(lengths)
    some: Any = connector  # or None, which has no arrays to divide
    cache, tokens, counts = alike(
        (cache, Tokens(query, key, value, some, controls, border), counts)
    )
    rows = ((x, "b . h .") for x in (query, key, value, connector))
    division = Division.of(*rows, (cache.position, "b"), (cache.key_sum, "b h"))
    if division is None:
        return compiled(_extend, cache, tokens, counts, hands_on=hands_on)
    # On the host a row's heads lie side by side, and all decide together where segments end.
    if config.placement == "host" or isinstance(config.segmentation, Adaptive):
        division = division.whole("h")
    row: Any = "b . h ."
    of_controls: Any = {
        name: memory.controls[name].axes.replace("t", ".") for name in tokens.controls
    }
    of_cache = cache.letters()
    of_border = None if border is None else "b . h"
    letters = of_cache, Tokens(row, row, row, row, of_controls, of_border), "b"
    run, out = functools.partial(_extend, hands_on=hands_on), (row, of_cache.alone(), None)
    out = (*out[:2], row) if hands_on else out
    return division.run(run, (cache, tokens, counts), letters, out)


def _extend(
    cache: Cache, tokens: Tokens, lengths: Int[Array, "b"], hands_on: bool = False
) -> tuple[Array, Cache, Array | None]:
    """``extend`` on one device."""
    check_not_mapped_over()
    config, memory, value = cache.config, cache.config.memory, tokens.value
    full = full_controls(memory, tokens.controls, tokens.key, tokens.value)
    tokens = widen(**tokens._replace(controls=full)._asdict(), dtype=cache.key_sum.dtype)
    count = tokens.key.shape[2]
    lengths = jnp.minimum(lengths, count)  # traced lengths have not been checked
    # Outputs of the other tokens are dropped, but gradients would pass through NaN in their reads.
    counts = (jnp.arange(count)[None] < lengths[:, None])[:, None, :, None]
    query, connector = (jnp.where(counts, x, 0) for x in (tokens.query, tokens.connector))
    tokens = tokens._replace(query=query, connector=connector)

    block = config.segmentation.size
    chunk = memory.gradient_chunk
    if chunk is None:
        chunk = exact_chunk(block, config.max_length or 2 * block, memory.largest_chunk)
    start = cache.position
    cache, (y, chosen) = _taken(chunk, hands_on, cache, tokens, lengths)
    # At the largest position nothing advances: the call's remaining tokens are not taken.
    token, room = jnp.arange(count)[None], _checks.LARGEST - start[:, None]
    beyond = (token >= room) & (token < lengths[:, None])
    y = jnp.where(beyond[:, None, :, None], jnp.nan, y)
    y = jnp.moveaxis(y, 1, 2).astype(value.dtype)
    return y, cache.alone(), None if chosen is None else jnp.moveaxis(chosen, 1, 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _taken(
    chunk: int, hands_on: bool, cache: Cache, tokens: Tokens, lengths: Int[Array, "b"]
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
    rest = _Steps.of_rest(cache, tokens, lengths, chunk).exhaust
    if not _has_wholes(chunk, cache, count):
        cache, _, y = rest(carry)
    else:
        whole = _Steps(tokens, lengths, chunk, chunk).exhaust
        # The rest of a chunk that was begun, then whole chunks; then what is left.
        cache, _, y = fori_loop(2, lambda carry: whole(rest(carry)), carry)
    return cache, y


@_taken.defjvp
def _(chunk: int, hands_on: bool, primals: tuple, tangents: tuple) -> tuple:
    return jax.jvp(functools.partial(_taken_in_scans, chunk, hands_on), primals, tangents)


def _taken_in_scans(
    chunk: int, hands_on: bool, cache: Cache, tokens: Tokens, lengths: Int[Array, "b"]
) -> tuple[Cache, tuple[Float[Array, "b h t v"], Float[Array, "b h t u"] | None]]:
    """As ``_taken``, in as many steps as any row may need."""
    count = tokens.key.shape[2]
    carry = _nothing_taken(cache, tokens, lengths, hands_on)
    rest = _Steps.of_rest(cache, tokens, lengths, chunk)
    if not _has_wholes(chunk, cache, count):
        times = 1 + -(-count // chunk) if rest.in_parts else count
        cache, _, y = _repeat(rest.advance, times, carry)
        return cache, y
    whole = _Steps(tokens, lengths, chunk, chunk)
    rewind = cache.config.goes_back
    times = 2 + -(-rewind // chunk) if rest.in_parts else chunk - 1 + rewind

    def some(carry: tuple) -> tuple:
        return _repeat(whole.advance, count // chunk, _repeat(rest.advance, times, carry))

    cache, _, y = _repeat(some, 2, carry)
    return cache, y


def _has_wholes(chunk: int, cache: Cache, count: int) -> bool:
    """Whether a row may take a whole chunk: the last tokens, to be taken back, are never in one."""
    return chunk > 1 and count >= chunk + cache.config.goes_back


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
    """

    tokens: Any
    lengths: Any
    chunk: int
    size: int
    in_parts: bool = False

    @classmethod
    def of_rest(cls, cache: Cache, tokens: Tokens, lengths: Int[Array, "b"], chunk: int) -> Any:
        """The steps that take tokens outside whole chunks."""
        if not cache.config.in_parts:
            return cls(tokens, lengths, chunk, 1)
        size = min(tokens.key.shape[2], chunk)
        # Zeros fill slices that reach past the last token.
        padded = jax.tree.map(
            lambda x: jnp.pad(x, [(0, size if axis == 2 else 0) for axis in range(x.ndim)]), tokens
        )
        return cls(padded, lengths, chunk, size, True)

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
        return done < self.lengths if self.chunk == 1 else ~whole & (done < self.lengths)

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
