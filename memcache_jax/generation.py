"""Generation: continuing token sequences with a causal model."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn import LanguageModel

_SMALLEST_BUFFER = 64


def generate(
    model: Callable[[Array], Array],
    prompt: jax.typing.ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    key: Array | None = None,
) -> Int[Array, "b t"]:
    """Continues every row of ``prompt``, one token after the other.

    Every new token costs a pass over a buffer of the next power of two (64 or more) that holds the
    prompt and all new tokens. There is one compilation per buffer length and batch size. A row's
    tokens depend on no other row's.

    Args:
      model: a causal model (b, t) int -> logits (b, t, vocab): an NNX module, in evaluation mode
        if it has one, or a function. Of an ``nn.LanguageModel``, only the last position goes
        through the output layer. Pass the same
        function again, not a new one, to reuse its compilation.
      prompt: (b, t) token ids.
      max_new_tokens: how many tokens to add to each row.
      temperature: divides the logits; 0 takes the most likely token.
      top_p: samples from the smallest set of most likely tokens whose probabilities sum to at
        least this, in (0, 1].
      stop_token: a row that has produced this token is filled up with it.
      key: a random key; not needed for temperature 0.

    Returns:
      (b, t + max_new_tokens) int32: the prompt and what follows it.

    Raises:
      ValueError: for a prompt that is not integers (b, t), is empty or has ids out of the model's
        vocabulary; for ``max_new_tokens``, ``temperature``, ``top_p`` or ``stop_token`` out of
        range; for a missing key; or if the model does not return (b, t, vocab).

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=1, features=32, num_heads=2)
      >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
      >>> mc.generate(model, jnp.array([[72, 105]]), max_new_tokens=5, temperature=0).shape
      (1, 7)
    """
    tokens = _check_prompt(prompt, model)
    _check_sampling(max_new_tokens, temperature, top_p, key)
    if stop_token is not None:
        _check_ids("stop_token", stop_token, stop_token, _vocab_size(model))

    batch, length = tokens.shape
    total = length + max_new_tokens
    size = max(_SMALLEST_BUFFER, 1 << (total - 1).bit_length())
    # What lies after a row's end is never read by a causal model, and is the stop token already.
    buffer = jnp.full((batch, size), 0 if stop_token is None else stop_token, jnp.int32)
    buffer = lax.dynamic_update_slice(buffer, tokens, (0, 0))

    graph, state = nnx.split(model) if isinstance(model, nnx.Module) else (model, None)
    buffer = _continue(
        buffer,
        state,
        jax.random.key(0) if key is None else key,
        start=length,
        end=total,
        temperature=temperature,
        top_p=top_p,
        stop_token=-1 if stop_token is None else stop_token,
        model=graph,
        greedy=temperature == 0,
        nucleus=top_p < 1,
    )
    return buffer[:, :total]


@functools.partial(jax.jit, static_argnames=("model", "greedy", "nucleus"), donate_argnums=0)
def _continue(
    buffer: Int[Array, "b size"],
    state: Any,
    key: Array,
    *,
    start: Array,
    end: Array,
    temperature: Array,
    top_p: Array,
    stop_token: Array,
    model: Any,
    greedy: bool,
    nucleus: bool,
) -> Int[Array, "b size"]:
    """Fills ``buffer[:, start:end]``, or less if every row has produced the stop token."""

    def unfinished(carry):
        position, _, finished = carry
        return (position < end) & ~jnp.all(finished)

    def add_token(carry):
        position, buffer, finished = carry
        logits = _next_logits(model, state, buffer, position - 1)
        if greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            step_key = jax.random.fold_in(key, position)
            token = _sample(step_key, logits, temperature, top_p, nucleus=nucleus)
        token = jnp.where(finished, stop_token, token.astype(jnp.int32))
        buffer = lax.dynamic_update_slice(buffer, token[:, None], (0, position))
        return position + 1, buffer, finished | (token == stop_token)

    carry = (start, buffer, jnp.zeros(buffer.shape[0], bool))
    return lax.while_loop(unfinished, add_token, carry)[1]


def _next_logits(
    model: Any, state: Any, tokens: Int[Array, "b size"], last: Int[Array, ""]
) -> Float[Array, "b vocab"]:
    """The logits of the token after position ``last``, in float32 or wider."""
    model = model if state is None else nnx.merge(model, state)
    if isinstance(model, LanguageModel):
        hidden = lax.dynamic_index_in_dim(model.hidden(tokens), last, axis=1, keepdims=False)
        logits = model.logits(hidden)
    else:
        logits = model(tokens)
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"the model must return logits (b, t, vocab) for tokens (b, t) = {tokens.shape}, "
                f"got shape {logits.shape}"
            )
        logits = lax.dynamic_index_in_dim(logits, last, axis=1, keepdims=False)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _sample(
    key: Array,
    logits: Float[Array, "b vocab"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    *,
    nucleus: bool,
) -> Int[Array, "b"]:
    """Draws one token per row."""
    # The largest logit becomes 0 first: then a tiny temperature overflows to -inf, never to nan.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)
    if not nucleus:
        return jax.random.categorical(key, logits)
    order = jnp.argsort(-logits, axis=-1)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The most likely token stays whatever rounding says.
    kept = (before < top_p).at[:, 0].set(True)
    rank = jax.random.categorical(key, jnp.where(kept, ordered, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


def _vocab_size(model: Any) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)


def _check_prompt(prompt: jax.typing.ArrayLike, model: Any) -> Int[Array, "b t"]:
    """Returns the prompt as int32, or raises ValueError."""
    traced = isinstance(prompt, Tracer)
    array: Any = prompt if traced else np.asarray(prompt)
    shape, dtype = array.shape, array.dtype
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"prompt must be integers of shape (b, t), got {dtype} {shape}")
    if 0 in shape:
        raise ValueError(f"prompt needs at least one row and one token, got shape {shape}")
    if not traced:
        _check_ids("prompt", int(array.min()), int(array.max()), _vocab_size(model))
    return jnp.asarray(array.astype(jnp.int32))


def _check_ids(name: str, smallest: int, largest: int, vocab_size: int | None) -> None:
    """Raises ValueError for ids that no token has."""
    limit = 2**31 if vocab_size is None else vocab_size
    if smallest < 0 or largest >= limit:
        raise ValueError(
            f"{name} must hold token ids of the model, 0 to {limit - 1}, "
            f"got {smallest if smallest < 0 else largest}"
        )


def _check_sampling(
    max_new_tokens: int, temperature: float, top_p: float, key: Array | None
) -> None:
    """Raises ValueError for numbers out of range, or a missing key."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if key is None and temperature > 0:
        raise ValueError(
            f"sampling at temperature {temperature} needs key=jax.random.key(...); "
            "temperature=0 takes the most likely token and needs none"
        )
