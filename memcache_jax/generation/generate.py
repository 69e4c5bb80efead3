"""Generation of a whole batch in one compiled loop."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memcache_jax._checks import check_instance, check_integer, check_lengths, check_mapping, shown
from memcache_jax._typing import Array, Float, Int
from memcache_jax.generation.apart import Frame, apart
from memcache_jax.generation.drafts import Draft
from memcache_jax.generation.prompts import buffer_size, check_prompt, check_stop, longest
from memcache_jax.generation.sampling import Sampling, sample
from memcache_jax.generation.speculate import speculate
from memcache_jax.nn import LanguageModel
from memcache_jax.nn.unrolled import Unrolled, cache_for, for_steps
from memcache_jax.streaming.loops import while_loop


def generate(
    model: Callable[[Array], Array],
    prompt: jax.typing.ArrayLike,
    max_new_tokens: int,
    *,
    lengths: jax.typing.ArrayLike | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_token: int | Sequence[int] | None = None,
    key: Array | None = None,
    cache: Mapping[str, Any] | None = None,
    draft: Draft | None = None,
) -> Int[Array, "b t"]:
    """Continues every row of ``prompt``, token by token.

    An ``nn.LanguageModel`` reads the prompt at once, then one token at a time from its cache. Any
    other model reads, for every token, a buffer with the prompt and all new tokens. Sizes of
    buffers and caches are rounded up to powers of two, at least 64 but at most what the segments of
    ``mc.Lengths`` hold, and so is the number of stop tokens, at least 8; each combination of these
    sizes and a batch size is compiled once. A row's tokens do not depend on other rows.

    Args:
      model: a causal model (b, t) int -> logits (b, t, vocab): an ``nn.LanguageModel``, another NNX
        module, in evaluation mode if it has one, or a function. Pass the same function object again
        to reuse its compilation.
      prompt: (b, t) token ids.
      max_new_tokens: number of tokens to add to each row.
      lengths: (b,) length of each row's prompt; t by default.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: samples from this many most likely tokens; None for all.
      top_p: samples from the smallest set of most likely tokens whose probabilities sum to at
        least this, in (0, 1].
      stop_token: one or several tokens that end a row; the rest of the row repeats it.
      key: a random key; not needed for temperature 0.
      cache: options of ``mc.init_cache`` for an ``nn.LanguageModel``: ``max_segments``,
        ``policy``, ``cache_dtype``.
      draft: what proposes tokens that an ``nn.LanguageModel`` then verifies in one call,
        ``mc.NGrams()`` or ``mc.DraftModel(smaller)``. It is faster where several stay; the
        distribution of tokens is the same, and for temperature 0 so are the tokens, up to ties of
        logits in the model's rounding.

    Returns:
      (b, t + max_new_tokens) int32: the prompt and the new tokens. With ``lengths``, new tokens
      follow each row's own prompt, and zeros follow them.

    Raises:
      ValueError: if the prompt is not integers (b, t), is empty, or has ids outside the model's
        vocabulary; if ``max_new_tokens``, ``lengths``, ``temperature``, ``top_k``, ``top_p`` or
        ``stop_token`` is out of range; if the key is missing; if the model does not return
        (b, t, vocab); or if ``cache`` or ``draft`` is given for a model without a cache, the cache
        has unknown options or is too small, or the draft has another vocabulary.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=1, features=32, num_heads=2)
      >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
      >>> mc.generate(model, jnp.array([[72, 105]]), max_new_tokens=5, temperature=0).shape
      (1, 7)
    """
    if not callable(model):
        raise ValueError(f"model must be a module or a function of tokens, got {shown(model)}")
    tokens = check_prompt(prompt, model)
    counts = check_lengths(lengths, tokens.shape, least=1).astype(np.int32)
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p)
    key = sampling.check_key(key)
    stops = check_stop(stop_token, model)
    length, most = tokens.shape[1], longest(model)
    size = buffer_size(length + max_new_tokens - 1, most)  # the last token is not appended
    options = check_mapping("cache", cache)
    if cache is not None:
        _check_cache(model, options, len(tokens), size, int(counts.max()), max_new_tokens)
    # NumPy, unless the prompt is traced: each operation of jax.numpy would dispatch a program.
    xp: Any = np if isinstance(tokens, np.ndarray) else jnp
    padded = xp.pad(tokens, ((0, 0), (0, buffer_size(length, most) - length)))
    graph, state = apart(model) if isinstance(model, nnx.Module) else (model, ())
    numbers = key, sampling.numbers, stops, max_new_tokens
    how: dict[str, Any] = dict(size=size, model=graph, cache=tuple(sorted(options.items())))
    if draft is None:
        new = _continue(padded, counts, state, *numbers, **how, **sampling.static)
    else:
        _check_draft(draft, model)
        kind, arrays = draft.split()
        how |= dict(draft=kind, **sampling.static)
        new, _ = speculate(padded, counts, state, arrays, *numbers, **how)
    return _followed(tokens, counts, new, max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def _followed(
    tokens: Int[Array, "b t"],
    counts: Int[Array, "b"],
    new: Int[Array, "b size"],
    *,
    max_new_tokens: int,
) -> Int[Array, "b total"]:
    """Each row's first ``counts`` tokens, the new ones, and zeros."""
    ahead = jnp.arange(tokens.shape[1] + max_new_tokens)[None] - counts[:, None]
    place = jnp.clip(ahead, 0, max_new_tokens - 1)
    after = jnp.where(ahead < max_new_tokens, jnp.take_along_axis(new, place, axis=1), 0)
    return jnp.where(ahead < 0, jnp.pad(tokens, ((0, 0), (0, max_new_tokens))), after)


def _check_draft(draft: Any, model: Any) -> None:
    """Raises ValueError unless it proposes tokens for this model."""
    check_instance("draft", draft, Draft, "mc.NGrams() or mc.DraftModel(model)")
    if not isinstance(model, LanguageModel):
        raise ValueError(f"draft={shown(draft)} is for an nn.LanguageModel, got {type(model)}")
    sizes = [m.config.vocab_size for m in (model, getattr(draft, "model", model))]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the draft must have the model's vocabulary, {sizes[0]}, got {sizes[1]}")


def _check_cache(
    model: Any, options: Mapping[str, Any], batch: int, size: int, prompt: int, new: int
) -> None:
    """Raises ValueError unless a cache with these options has room for prompts and new tokens.

    The cache is for ``size`` tokens, and a prompt has up to ``prompt`` of them.
    """
    if not isinstance(model, LanguageModel):
        raise ValueError(f"cache={dict(options)} is for an nn.LanguageModel, got {type(model)}")
    taken = prompt + new - 1
    empty = jax.eval_shape(lambda: model.init_cache(batch, size, **options))
    if empty.max_length is not None and taken > empty.max_length:
        raise ValueError(
            f"cache={dict(options)} has room for {empty.max_length} tokens in a row; a prompt of "
            f"{prompt} and max_new_tokens={new} need {taken}: give a larger max_segments or a "
            "policy that makes room"
        )


@functools.partial(
    jax.jit, static_argnames=("size", "model", "cache", "greedy", "top_k", "nucleus")
)
def _continue(
    prompt: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    state: Any,
    key: Array,
    numbers: tuple[Any, Any],
    stops: Int[Array, "stops"],
    max_new_tokens: Int[Array, ""],
    *,
    size: int,
    model: Any,
    cache: tuple[tuple[str, Any], ...],
    **sampling: Any,
) -> Int[Array, "b size"]:
    """Returns the new tokens of each row."""
    model = model.merge(state) if isinstance(model, Frame) else model
    kind = _Cached(model, dict(cache)) if isinstance(model, LanguageModel) else _Uncached(model)

    def draw(step: Any, logits: Array, last: Array, finished: Array) -> tuple[Array, Array]:
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        token = sample(jax.random.fold_in(key, step), wide, numbers, **sampling)
        token = jnp.where(finished, last, token)
        return token, finished | (token[:, None] == stops[None]).any(axis=1)

    def unfinished(carry: tuple) -> Array:
        step, _, _, _, finished = carry
        return (step < max_new_tokens) & ~finished.all()

    def add_token(carry: tuple) -> tuple:
        step, past, new, token, finished = carry
        past, logits = kind.next(past, token)
        token, finished = draw(step, logits, token, finished)
        return step + 1, past, new.at[:, step].set(token), token, finished

    past, logits = kind.start(prompt, lengths, size)
    token, finished = draw(0, logits, prompt[:, 0], jnp.zeros(len(prompt), bool))
    new = jnp.zeros((len(prompt), size), jnp.int32).at[:, 0].set(token)
    step, _, new, token, _ = while_loop(
        unfinished, add_token, (jnp.int32(1), past, new, token, finished)
    )
    return jnp.where(jnp.arange(size)[None] < step, new, token[:, None])


class _Cached:
    """Extends a cache."""

    def __init__(self, model: LanguageModel, options: dict[str, Any]) -> None:
        self.model, self.options, self.stepping = model, options, for_steps(model)

    def start(self, prompt: Array, lengths: Array, size: int) -> tuple[Any, Float[Array, "b v"]]:
        cache = self.model.init_cache(len(prompt), size, **self.options)
        cache, logits = extend_logits(self.model, prompt, cache, lengths)
        return cache_for(self.stepping, cache), logits

    def next(self, cache: Any, token: Int[Array, "b"]) -> tuple[Any, Float[Array, "b v"]]:
        return extend_logits(self.stepping, token[:, None], cache)


class _Uncached:
    """Runs the model over the whole buffer for every token."""

    def __init__(self, model: Callable[[Array], Array]) -> None:
        self.model = model

    def start(self, prompt: Array, lengths: Array, size: int) -> tuple[Any, Float[Array, "b v"]]:
        # A causal model never reads the padding after a row's end.
        buffer = jnp.pad(prompt, ((0, 0), (0, size - prompt.shape[1])))
        return (buffer, lengths), self._logits(buffer, lengths - 1)

    def next(self, past: tuple, token: Int[Array, "b"]) -> tuple[Any, Float[Array, "b v"]]:
        buffer, position = past
        buffer = jax.vmap(lambda row, i, token: row.at[i].set(token))(buffer, position, token)
        return (buffer, position + 1), self._logits(buffer, position)

    def _logits(self, tokens: Int[Array, "b t"], last: Int[Array, "b"]) -> Float[Array, "b v"]:
        logits = self.model(tokens)
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"the model must return logits (b, t, vocab) for tokens (b, t) = {tokens.shape}, "
                f"got shape {logits.shape}"
            )
        return _at(logits, last)


def extend_logits(
    model: LanguageModel | Unrolled,
    tokens: Int[Array, "b t"],
    cache: Any,
    lengths: Array | None = None,
) -> tuple[Any, Float[Array, "b v"]]:
    """Returns the cache extended by tokens, and the logits after each row's last token."""
    hidden, cache = model.extend(tokens, cache, lengths)
    if lengths is None:
        return cache, model.logits(hidden[:, -1])
    return cache, model.logits(_at(hidden, jnp.maximum(lengths, 1) - 1))


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def extend_in_place(
    state: Any,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"] | None,
    cache: Any,
    *,
    graph: Frame,
) -> tuple[Any, Float[Array, "b v"]]:
    """``extend_logits`` of a model ``apart``, compiled; the cache's arrays are used again."""
    return extend_logits(graph.merge(state), tokens, cache, lengths)


def _at(rows: Float[Array, "b t d"], position: Int[Array, "b"]) -> Float[Array, "b d"]:
    return jnp.take_along_axis(rows, position[:, None, None], axis=1)[:, 0]
