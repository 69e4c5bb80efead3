"""The compiled parts of a ``Batcher``: a token for every row, and a piece of one prompt."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.generation.apart import Frame
from memcache_jax.generation.generate import extend_logits
from memcache_jax.generation.sampling import scaled, within_nucleus
from memcache_jax.nn import LanguageModelConfig
from memcache_jax.nn.unrolled import UnrolledCache, unrolled_cache
from memcache_jax.serving.request import Request
from memcache_jax.serving.scores import Scores, scores_if
from memcache_jax.sharding.layout import axes_of, by_compiler, like
from memcache_jax.streaming.loops import Slim, while_loop

_DTYPES: Any = np.int32, np.uint32, np.int32, np.float32, np.int32, np.float32, bool


class Draws(NamedTuple):
    """How each row's next token is drawn, on the device.

    Attributes:
      last: the token drawn last, which the cache does not have yet.
      seed: the request's.
      drawn: tokens drawn before.
      temperature: 0 for the most likely token.
      top_k: how many tokens may be drawn; 0 for all.
      top_p: their probability in all.
      scored: whether to tell how likely tokens are.
    """

    last: Int[Array, "b"]
    seed: Int[Array, "b"]
    drawn: Int[Array, "b"]
    temperature: Float[Array, "b"]
    top_k: Int[Array, "b"]
    top_p: Float[Array, "b"]
    scored: Bool[Array, "b"]

    @classmethod
    def none(cls, rows: int) -> "Draws":
        """Those of rows without requests."""
        arrays: Any = (np.zeros(rows, dtype) for dtype in _DTYPES)
        return cls(*arrays)

    @classmethod
    def of(cls, request: Request) -> "Draws":
        """Those of a row whose request has no token yet."""
        how, scored = request.sampling, request.scoring.likely is not None
        values = 0, request.seed, 0, how.temperature, how.top_k or 0, how.top_p, scored
        arrays: Any = (np.array([x], dtype) for x, dtype in zip(values, _DTYPES, strict=True))
        return cls(*arrays)

    def after(self, tokens: Int[Array, "b"], rows: Bool[Array, "b"] | bool = True) -> "Draws":
        """Those after these tokens, in the marked rows."""
        last = jnp.where(rows, jnp.maximum(tokens, 0), self.last)
        return self._replace(last=last, drawn=self.drawn + jnp.where(rows, 1, 0))


@functools.partial(jax.jit, static_argnames=("graph", "most"), donate_argnames="cache")
def decode(
    state: Any,
    active: Bool[Array, "b"],
    times: Int[Array, ""],
    draws: Draws,
    cache: Slim,
    *,
    graph: Frame,
    most: int,
) -> tuple[Int[Array, "most b"], Scores, Draws, Slim]:
    """Appends to the active rows their last tokens, and draws the next, ``times`` times.

    Returns these tokens, in arrays of ``most``, their scores (most, b, ...), and what the next call
    takes.
    """
    model, position = graph.merge(state), cache.full().position
    active, draws = jax.tree.map(lambda x: like(position, x), (active, draws))
    lengths = active.astype(jnp.int32)

    def step(draws: Draws, cache: Any) -> tuple:
        cache, logits = extend_logits(model, draws.last[:, None], cache, lengths)
        temperature, scored = jnp.where(active, draws.temperature, 0), active & draws.scored
        new = draw_scored(logits, draws._replace(temperature=temperature, scored=scored))
        return new, draws.after(new[0], active), cache

    if most == 1:
        new, draws, after = step(draws, cache.full())
        return *jax.tree.map(lambda x: x[None], new), draws, Slim.of(after)

    def next_tokens(carry: tuple) -> tuple:
        i, every, draws, cache = carry
        new, draws, cache = step(draws, cache)
        every = jax.tree.map(lambda kept, x: kept.at[i].set(like(kept[0], x)), every, new)
        return i + 1, every, draws, cache

    shapes: Any = jax.eval_shape(lambda: step(draws, cache.full())[0])

    def zeros(x: Any) -> Array:  # on the mesh of the cache, if it has one
        make = functools.partial(jnp.zeros, (most, *x.shape), x.dtype)
        return by_compiler(lambda _: make(), position, axes=())

    every = jax.tree.map(zeros, shapes)
    first = jnp.int32(0), every, draws, cache.full()
    _, every, draws, after = while_loop(lambda carry: carry[0] < times, next_tokens, first)
    return *every, draws, Slim.of(after)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def begin(
    logits: Float[Array, "1 vocab"],
    row: Int[Array, ""],
    own: Draws,
    other: Any,
    draws: Draws,
    cache: Slim,
    *,
    config: LanguageModelConfig,
) -> tuple[Int[Array, "1 1"], Scores, Draws, Slim]:
    """Gives a row to a request whose prompt has been read into ``other``, a cache of one row.

    Returns as ``decode``, with the token that the prompt's logits give.
    """
    new = draw_scored(logits, own)
    rows = cache.full()
    if isinstance(rows, UnrolledCache):
        other = unrolled_cache(config, other)
    draws = jax.tree.map(
        lambda x, one: lax.dynamic_update_slice(x, one, (row,)), draws, own.after(new[0])
    )
    return *jax.tree.map(lambda x: x[None], new), draws, Slim.of(rows.put(row, other))


def draw_scored(logits: Float[Array, "b vocab"], draws: Draws) -> tuple[Int[Array, "b"], Scores]:
    """As ``draw``, and the tokens' scores if any row wants them."""

    def drawn(logits: Array, *of_draws: Array) -> tuple[Array, Scores]:
        draws = Draws(*of_draws)
        tokens = draw(logits, draws)
        return tokens, scores_if(draws.scored.any(), lambda: logits, tokens)

    return by_compiler(drawn, logits, *draws, axes=axes_of(logits)[:1])


def draw(logits: Float[Array, "b vocab"], draws: Draws) -> Int[Array, "b"]:
    """A token of each row, which depends on nothing but it; -1 where logits are not finite."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    rows = scaled(logits, draws.temperature[:, None])
    limited = (draws.temperature > 0) & ((draws.top_k > 0) | (draws.top_p < 1))

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


def whole_on_mesh_of(*arrays: Any) -> NamedSharding | None:
    """Where arrays lie whole on each device of the mesh of others; None without one."""
    places = [x.sharding for x in jax.tree.leaves(arrays)]
    meshes = [x.mesh for x in places if isinstance(x, NamedSharding) and x.mesh.size > 1]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else None
