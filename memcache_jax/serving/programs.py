"""The compiled parts of a ``Batcher``: a token for every row, and a piece of one prompt."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.generation.apart import Frame
from memcache_jax.generation.generate import extend_logits
from memcache_jax.generation.sampling import scaled, within_nucleus
from memcache_jax.nn import LanguageModelConfig
from memcache_jax.nn.unrolled import UnrolledCache, unrolled_cache
from memcache_jax.serving.request import Request
from memcache_jax.serving.scores import Scores, scores_if
from memcache_jax.streaming.loops import Slim, while_loop


class Draws(NamedTuple):
    """How each row's next token is drawn.

    Attributes:
      seed: the request's.
      drawn: tokens drawn before.
      temperature: 0 for the most likely token.
      top_k: how many tokens may be drawn; 0 for all.
      top_p: their probability in all.
      scored: whether to tell how likely tokens are.
    """

    seed: Int[Array, "b"]
    drawn: Int[Array, "b"]
    temperature: Float[Array, "b"]
    top_k: Int[Array, "b"]
    top_p: Float[Array, "b"]
    scored: Bool[Array, "b"]

    @classmethod
    def of(cls, requests: Sequence[Request | None]) -> "Draws":
        """Those of each row's request."""

        def of_row(request: Request | None) -> tuple:
            if request is None:
                return 0, 0, 0.0, 0, 1.0, False
            how, drawn = request.sampling, len(request.tokens)
            scored = request.scoring.likely is not None
            return request.seed, drawn, how.temperature, how.top_k or 0, how.top_p, scored

        columns = zip(*map(of_row, requests), strict=True)
        dtypes: Any = np.uint32, np.int32, np.float32, np.int32, np.float32, bool
        arrays: Any = [np.array(x, dtype) for x, dtype in zip(columns, dtypes, strict=True)]
        return cls(*arrays)


@functools.partial(jax.jit, static_argnames=("graph", "most"), donate_argnames="cache")
def decode(
    state: Any,
    tokens: Int[Array, "b"],
    active: Bool[Array, "b"],
    draws: Draws,
    times: Int[Array, ""],
    cache: Slim,
    *,
    graph: Frame,
    most: int,
) -> tuple[Int[Array, "most b"], Scores, Slim]:
    """Appends to the active rows their given tokens, and then those that it draws.

    Returns the next ``times`` tokens, in arrays of ``most``, their scores (most, b, ...), and the
    cache.
    """
    model, lengths = graph.merge(state), active.astype(jnp.int32)

    def step(tokens: Array, drawn: Array | int, cache: Any) -> tuple:
        cache, logits = extend_logits(model, tokens[:, None], cache, lengths)
        return *draw_scored(logits, draws._replace(drawn=draws.drawn + drawn)), cache

    if most == 1:
        *new, after = step(tokens, 0, cache.full())
        return *jax.tree.map(lambda x: x[None], tuple(new)), Slim.of(after)

    def next_tokens(carry: tuple) -> tuple:
        i, tokens, every, cache = carry
        *new, cache = step(tokens, i, cache)
        every = jax.tree.map(lambda kept, x: kept.at[i].set(x), every, tuple(new))
        return i + 1, jnp.maximum(new[0], 0), every, cache

    shapes: Any = jax.eval_shape(lambda: step(tokens, 0, cache.full())[:2])
    every = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes)
    first = jnp.int32(0), tokens, every, cache.full()
    _, _, every, after = while_loop(lambda carry: carry[0] < times, next_tokens, first)
    return *every, Slim.of(after)


@jax.jit
def draw_scored(logits: Float[Array, "b vocab"], draws: Draws) -> tuple[Int[Array, "b"], Scores]:
    """As ``draw``, and the tokens' scores if any row wants them."""
    tokens = draw(logits, draws)
    return tokens, scores_if(draws.scored.any(), lambda: logits, tokens)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def put(cache: Slim, row: Array, other: Any, *, config: LanguageModelConfig) -> Slim:
    """Puts a cache of one row, which a prompt has been read into, in place of a row."""
    rows = cache.full()
    if isinstance(rows, UnrolledCache):
        other = unrolled_cache(config, other)
    return Slim.of(rows.put(row, other))


def draw(logits: Float[Array, "b vocab"], draws: Draws) -> Int[Array, "b"]:
    """A token of each row, which depends on nothing but it; -1 where logits are not finite."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    rows = scaled(logits, draws.temperature[:, None])
    limited = (draws.top_k > 0) | (draws.top_p < 1)

    def one(row: Array, of_row: Draws) -> Array:
        key = jax.random.fold_in(jax.random.key(of_row.seed), of_row.drawn)
        return jax.random.categorical(key, row).astype(jnp.int32)

    def of_likely(row: Array, of_row: Draws) -> Array:
        ordered, order = lax.top_k(row, len(row))
        most = jnp.where(of_row.top_k > 0, of_row.top_k, len(row))
        ordered = jnp.where(jnp.arange(len(row)) < most, ordered, -jnp.inf)
        ordered = jnp.where(of_row.top_p < 1, within_nucleus(ordered, of_row.top_p), ordered)
        return one(jnp.zeros_like(row).at[order].set(ordered), of_row)

    def drawn() -> Array:
        # Sorting a vocabulary takes time, and most rows ask for none.
        return lax.cond(
            limited.any(),
            lambda: jnp.where(
                limited, jax.vmap(of_likely)(rows, draws), jax.vmap(one)(rows, draws)
            ),
            lambda: jax.vmap(one)(rows, draws),
        )

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = lax.cond((draws.temperature > 0).any(), drawn, lambda: greedy)
    token = jnp.where(draws.temperature > 0, token, greedy)
    broken = jnp.isnan(logits) | (logits == jnp.inf)  # a logit of -inf is a token that never comes
    return jnp.where(broken.any(axis=-1), -1, token)


def on_device_of(state: Any, cache: Any) -> Any:
    """The cache, committed to the parameters' device if they are committed to a single one.

    A step's outputs are then committed, and an uncommitted cache would compile the step again.
    """
    places = {x.sharding for x in jax.tree.leaves(state) if x.committed}
    if len(places) != 1 or len(place := places.pop().device_set) != 1:
        return cache
    device = next(iter(place))
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, device), cache)
