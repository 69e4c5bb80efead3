"""Speculative decoding: a draft proposes tokens, and the model takes those it would have drawn."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Int
from memcache_jax.generation.apart import Frame
from memcache_jax.generation.drafts import merge
from memcache_jax.generation.prefill import prefill
from memcache_jax.generation.sampling import probabilities, sample
from memcache_jax.nn.unrolled import cache_for, for_steps
from memcache_jax.streaming.cache import Cache
from memcache_jax.streaming.loops import once_if, while_loop


@functools.partial(
    jax.jit, static_argnames=("size", "model", "cache", "draft", "greedy", "top_k", "nucleus")
)
def speculate(
    prompt: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    state: Any,
    drafts: Any,
    key: Array,
    numbers: tuple[Any, Any],
    stops: Int[Array, "stops"],
    max_new_tokens: Int[Array, ""],
    *,
    size: int,
    model: Frame,
    cache: tuple[tuple[str, Any], ...],
    draft: Any,
    **sampling: Any,
) -> tuple[Int[Array, "b size"], Int[Array, ""]]:
    """Returns the new tokens of each row, and the number of the model's calls after the prompt.

    A call takes the last token x_0 and proposed ones x_1 .. x_K. With p_i what the model gives to
    the token after x_i, and q_i what the draft has drawn x_{i+1} with, x_{i+1} stays with
    probability min(1, p_i / q_i). In place of the first that does not, one is drawn from
    max(p_i - q_i, 0), normalized; after the last, from p_K. So each token has the distribution p
    (arXiv:2211.17192), and for temperature 0 is the most likely one. Rows that keep fewer than were
    proposed are rewound; if a layer cannot rewind, a second call reads the kept tokens from the
    previous cache.
    """
    net: Any = model.merge(state)
    proposer, vocab = merge(draft, drafts), net.config.vocab_size
    empty = _cache_back(net, len(prompt), size, proposer.tokens, dict(cache))
    sizes, chunk = _call_sizes(proposer.tokens + 1), _chunk_of(empty, proposer.tokens + 1)
    hidden, past = prefill(net, prompt, empty, lengths)
    stepping = for_steps(net)
    past = cache_for(stepping, past)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    first = sample(jax.random.fold_in(key, 0), net.logits(last), numbers, **sampling)
    room = prompt.shape[1] + size + proposer.tokens + 1
    known = jnp.pad(prompt, ((0, 0), (0, room - prompt.shape[1])))
    known = _put(known, lengths, first[:, None], jnp.ones_like(lengths))
    ended = (first[:, None] == stops[None]).any(axis=1)

    def unfinished(carry: tuple) -> Array:
        _, new, ended, _, _, _ = carry
        return ((new < max_new_tokens) & ~ended).any()

    def verify(carry: tuple) -> tuple:
        known, new, ended, past, draft_past, step = carry
        count, left = lengths + new, max_new_tokens - new
        # So many proposed tokens count; the last new token is drawn, and not taken.
        most = jnp.minimum(proposer.tokens, left - 1)
        if chunk is not None:
            most = jnp.minimum(most, chunk - 1 - (count - 1) % chunk)
        most = jnp.where(ended | (left < 1), -1, most)
        of_draft, of_model = jax.random.split(jax.random.fold_in(key, step))
        args = known, count, most, of_draft, numbers, vocab
        tokens, chances, proposed, draft_past = proposer.propose(draft_past, *args, **sampling)
        last = jnp.take_along_axis(known, count[:, None] - 1, axis=1)
        given = jnp.concatenate([last, tokens], axis=1)

        def read(given: Array, past: Any) -> tuple[Any, Array]:
            hidden, after = stepping.extend(given, past, proposed + 1)
            wanted = probabilities(net.logits(hidden), numbers, **sampling)
            beyond = 1 + tokens.shape[1] - given.shape[1]
            return after, jnp.pad(wanted, ((0, 0), (0, beyond), (0, 0)))

        none: Any = jax.eval_shape(lambda: read(given, past)[1])
        done, taken = (past, jnp.zeros(none.shape, none.dtype)), 1 + proposed.max()
        for smaller, size_of_call in zip((0, *sizes), sizes, strict=False):
            chosen, its = (smaller < taken) & (taken <= size_of_call), given[:, :size_of_call]
            done = once_if(chosen, lambda done, its: read(its, done[0]), done, its)
        ahead, wanted = done
        kept, next_token = accept(of_model, tokens, chances, wanted, proposed)
        stays = jnp.minimum(kept, proposed)  # -1 in rows that have ended

        def back(ahead: Any, before: tuple) -> Any:
            if ahead.rewindable is not None:
                return ahead.rewind(proposed - stays)
            return stepping.extend(given, before[0], stays + 1)[1]

        before = (past,) if past.rewindable is None else ()
        past = once_if((stays < proposed).any(), back, ahead, before)
        draft_past = proposer.keep(draft_past, jnp.maximum(most - kept, 0))
        drawn = _put(jnp.pad(tokens, ((0, 0), (0, 1))), kept, next_token[:, None], kept * 0 + 1)
        # What follows a stop token does not count.
        stop = (drawn[..., None] == stops[None, None]).any(axis=-1)
        stop &= jnp.arange(stop.shape[1])[None] <= kept[:, None]
        added = jnp.where(stop.any(axis=1), jnp.argmax(stop, axis=1), kept) + 1
        added = jnp.where(most < 0, 0, added).astype(new.dtype)
        known = _put(known, count, drawn, added)
        return known, new + added, ended | stop.any(axis=1), past, draft_past, step + 1

    draft_past = proposer.start(prompt, lengths, size)
    carry = known, jnp.ones_like(lengths), ended, past, draft_past, jnp.int32(1)
    known, new, _, _, _, step = while_loop(unfinished, verify, carry)
    place = lengths[:, None] + jnp.minimum(jnp.arange(size)[None], new[:, None] - 1)
    return jnp.take_along_axis(known, place, axis=1), step - 1


def _call_sizes(most: int) -> tuple[int, ...]:
    """Sizes of calls, in tokens: one without proposed tokens, of half of them, and of all."""
    return (1, most) if most < 8 else (1, most // 2, most)


def _chunk_of(cache: Any, tokens: int) -> int | None:
    """The size of chunks that a call of so many tokens should stay in; None for any.

    A deep memory takes tokens of one chunk at once, and those of the next one after them.
    """
    caches = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, Cache))
    configs = [x.config for x in caches if isinstance(x, Cache) and x.config.in_parts]
    chunks = [config.memory.gradient_chunk or 1 for config in configs]
    return min((chunk for chunk in chunks if chunk >= tokens), default=None)


def _cache_back(net: Any, rows: int, size: int, tokens: int, options: dict[str, Any]) -> Any:
    """An empty cache that can rewind ``tokens``, or just as ``options`` say if a layer cannot."""
    try:
        return net.init_cache(
            rows, size, **options | {"rewind": max(tokens, options.get("rewind", 0))}
        )
    except ValueError:  # the other options have been checked
        return net.init_cache(rows, size, **options)


def accept(
    key: Array,
    tokens: Int[Array, "b k"],
    chances: Float[Array, "b k vocab"],
    wanted: Float[Array, "b n vocab"],
    most: Int[Array, "b"],
) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
    """Returns how many proposed tokens stay, and the token after them.

    Args:
      key: a random key.
      tokens: the proposed tokens.
      chances: the distributions that they were drawn from.
      wanted: the model's distributions of the same tokens, and of the one after them, n = k + 1.
      most: how many count.
    """
    of_uniform, of_token = jax.random.split(key)
    count = tokens.shape[1]

    def of_tokens(rows: Array) -> Array:
        return jnp.take_along_axis(rows, tokens[..., None], axis=2)[..., 0]

    share = jax.random.uniform(of_uniform, tokens.shape, wanted.dtype) * of_tokens(chances)
    stays = (share < of_tokens(wanted[:, :count])) & (jnp.arange(count)[None] < most[:, None])
    kept = jnp.cumprod(stays, axis=1).sum(axis=1).astype(jnp.int32)

    def at(rows: Array) -> Array:
        return jnp.take_along_axis(rows, kept[:, None, None], axis=1)[:, 0]

    target = at(wanted)
    drawn = at(jnp.pad(chances, ((0, 0), (0, 1), (0, 0))))
    rest = jnp.maximum(target - jnp.where((kept < most)[:, None], drawn, 0), 0)
    # Where nothing is left, of equal distributions, rounding has refused what stays.
    rest = jnp.where(rest.sum(axis=1, keepdims=True) > 0, rest, target)
    return kept, jax.random.categorical(of_token, jnp.log(rest)).astype(jnp.int32)


def _put(
    rows: Int[Array, "b size"],
    begin: Int[Array, "b"],
    new: Int[Array, "b n"],
    counts: Int[Array, "b"],
) -> Int[Array, "b size"]:
    """The rows with the first ``counts`` of the new values from ``begin`` on."""
    ahead = jnp.arange(new.shape[1])[None]
    place = jnp.where(ahead < counts[:, None], begin[:, None] + ahead, rows.shape[1])
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(rows, place, new)
