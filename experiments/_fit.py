"""Trains small models to answer at given positions of generated sequences, several at once.

Replicas with different seeds and learning rates run as one program, by ``vmap`` over models.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.nn import LanguageModel, LanguageModelConfig, RouterLoss, with_router_noise
from memcache_jax.nn.parallel import side_by_side
from memcache_jax.training.optimizer import decays


class Questions(NamedTuple):
    """Sequences, and the positions whose next token is the answer: integer arrays."""

    tokens: Any  # (*b, l)
    places: Any  # (*b, n)
    answers: Any  # (*b, n)


Source = Callable[[Array], Questions]
"""Draws an example from a random key: tokens (l,), places and answers (n,)."""


class Replica(NamedTuple):
    """The seed and peak learning rate of one of several models trained at once."""

    seed: int
    learning_rate: float


class Recipe(NamedTuple):
    """How to train: AdamW, a linear warm-up, and cosine decay to zero.

    Attributes:
      steps: number of updates; they take their examples from the sources in turn.
      batch_size: examples per update.
      weight_decay: of matrices and embeddings.
      warmup_steps: updates of the linear warm-up.
      clip_norm: of each replica's gradient.
      examples: number of distinct examples of each source, reused in a new order each time; 0 for
        new ones in every update.
      router_noise: scale of ``with_router_noise``.
      router_loss: weight of each layer's ``RouterLoss``.
    """

    steps: int
    batch_size: int
    weight_decay: float = 0.1
    warmup_steps: int = 100
    clip_norm: float = 1.0
    examples: tuple[int, ...] | None = None
    router_noise: float = 0.0
    router_loss: float = 0.0


class Fitted(NamedTuple):
    """Trained replicas.

    Attributes:
      graph: their model without its arrays.
      params: their parameters, with a leading axis of replicas.
      losses: their last mean losses, (replicas,); NaN if one diverged.
    """

    graph: nnx.GraphDef
    params: Any
    losses: Float[np.ndarray, "replicas"]

    def answers(
        self, questions: Questions, batch_size: int, cache: Mapping[str, Any] | None = None
    ) -> Bool[np.ndarray, "replicas b n"]:
        """Returns whether each answer is the most likely token, for every replica.

        Args:
          questions: the examples.
          batch_size: examples at a time.
          cache: options of ``init_cache``, to read as a stream; by default in one pass.
        """
        options, parts = tuple(sorted((cache or {}).items())), []
        for begin in range(0, len(questions.tokens), batch_size):
            # The first rows fill up the last batch, so that all have one shape.
            rows = np.arange(begin, begin + batch_size) % len(questions.tokens)
            batch = jax.tree.map(lambda x, rows=rows: x[rows], questions)
            parts.append(np.asarray(_right(self.graph, options, self.params, batch)))
        return np.concatenate(parts, axis=1)[:, : len(questions.tokens)]


def fit(
    model: LanguageModelConfig,
    sources: Sequence[Source],
    replicas: Sequence[Replica],
    recipe: Recipe,
    *,
    name: str = "",
) -> Fitted:
    """Trains replicas of a model side by side.

    Args:
      model: the model.
      sources: draw the examples, each source of one shape.
      replicas: the seed and peak learning rate of each replica.
      recipe: how to train them.
      name: starts the progress lines.

    Returns:
      The replicas, after the last step or once all of them have diverged.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(recipe.weight_decay, mask=decays),
    )
    graph = nnx.split(nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0))))[0]

    def create(key: Array) -> tuple[Any, Any]:
        params = nnx.to_pure_dict(nnx.state(LanguageModel(model, rngs=nnx.Rngs(key)), nnx.Param))
        return params, optimizer.init(params)

    def loss_fn(params: Any, questions: Questions, key: Array) -> tuple[Array, Array]:
        model, losses = nnx.merge(graph, params), {}
        if recipe.router_noise:
            model = with_router_noise(model, key, recipe.router_noise)
        if recipe.router_loss:
            forward = nnx.capture(lambda model: _logits(model, questions), RouterLoss)
            logits, losses = forward(model)
        else:
            logits = _logits(model, questions)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, questions.answers).mean()
        return loss + recipe.router_loss * sum(map(jnp.sum, jax.tree.leaves(losses))), loss

    def make_update(index: int) -> Callable[..., Any]:
        def update(state: Any, key: Array, rate: Array, rows: Array) -> tuple[Any, Array]:
            params, opt_state = state
            key = jax.random.fold_in(key, index)
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
            questions, of_noise = jax.vmap(sources[index])(keys), jax.random.fold_in(keys[0], 1)
            gradient, loss = jax.grad(loss_fn, has_aux=True)(params, questions, of_noise)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            updates = jax.tree.map(lambda x: -rate * x, updates)
            return (optax.apply_updates(params, updates), opt_state), loss

        return jax.jit(jax.vmap(update, in_axes=(0, 0, 0, None)), donate_argnums=0)

    seeds = jnp.array([replica.seed for replica in replicas], jnp.uint32)
    keys = jax.vmap(jax.random.key)(seeds)
    peaks = np.array([replica.learning_rate for replica in replicas], np.float32)
    # lax.map, because vmap over the random initialization takes twice as long to compile.
    state = jax.jit(lambda keys: jax.lax.map(create, keys))(keys)
    updates = [make_update(index) for index in range(len(sources))]
    examples = recipe.examples or (0,) * len(sources)
    rows = [_rows(count, recipe.batch_size, i) for i, count in enumerate(examples)]
    began, recent = time.monotonic(), []
    losses = np.zeros(len(replicas))
    for step in range(recipe.steps):
        kind = step % len(sources)
        state, loss = updates[kind](state, keys, peaks * _rate(step, recipe), next(rows[kind]))
        recent.append(loss)
        if (step + 1) % 250 == 0 or step + 1 == recipe.steps:
            losses, recent = np.mean(jax.device_get(recent), axis=0), []
            shown = " ".join(f"{x:.3f}" for x in losses)
            rate = (step + 1) / (time.monotonic() - began)
            line = f"{name}  step {step + 1}/{recipe.steps}  loss {shown}  {rate:.1f} steps/s"
            print(line, flush=True)
            if not np.isfinite(losses).any():
                break
    return Fitted(graph, state[0], losses)


def _logits(
    model: LanguageModel, questions: Questions, cache: Mapping[str, Any] | None = None
) -> Float[Array, "b n vocab"]:
    """Returns the logits at the asked positions only: a large vocabulary's are most of the work."""
    hidden = hidden_of(model, questions.tokens, cache)
    return model.logits(jnp.take_along_axis(hidden, questions.places[..., None], axis=1))


def hidden_of(
    model: LanguageModel, tokens: Int[Array, "b t"], cache: Mapping[str, Any] | None
) -> Float[Array, "b t d"]:
    """Returns ``model.hidden``; with options of ``init_cache``, that of a stream.

    No piece of the stream crosses the end of a segment, so that all cached states are read in the
    form in which the cache keeps them.
    """
    if not cache:
        return model.hidden(tokens)
    rows, length = tokens.shape
    sizes = [getattr(getattr(mixer, "segmentation", None), "size", 0) for mixer in _mixers(model)]
    piece = min(math.gcd(*sizes) or length, length)
    whole = length // piece * piece
    pieces = tokens[:, :whole].reshape(rows, -1, piece)

    def step(stream: Any, piece: Array) -> tuple[Any, Array]:
        hidden, stream = model.extend(piece, stream)
        return stream, hidden

    empty = model.init_cache(rows, length, **cache)
    stream, hidden = jax.lax.scan(step, empty, jnp.moveaxis(pieces, 1, 0))
    hidden = jnp.moveaxis(hidden, 0, 1).reshape(rows, whole, -1)
    if whole < length:
        rest, _ = model.extend(tokens[:, whole:], stream)
        hidden = jnp.concatenate([hidden, rest], axis=1)
    return hidden


def _mixers(model: LanguageModel) -> list[Any]:
    mixers = [block.mixer for blocks, _ in model.config.stacks for block in blocks]
    return [part for mixer in mixers for part in side_by_side(mixer).values()]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(
    graph: nnx.GraphDef, cache: tuple[tuple[str, Any], ...], params: Any, questions: Questions
) -> Bool[Array, "replicas b n"]:
    """``Fitted.answers`` for a batch, compiled once per shape."""

    def of_replica(params: Any) -> Array:
        logits = _logits(nnx.merge(graph, params), questions, dict(cache))
        return jnp.argmax(logits, axis=-1) == questions.answers

    return jax.vmap(of_replica)(params)


def _rate(step: int, recipe: Recipe) -> np.float32:
    """Returns the learning rate of a step, as a fraction of the peak."""
    rise = min((step + 1) / (recipe.warmup_steps + 1), 1.0)
    left = max(recipe.steps - recipe.warmup_steps, 1)
    progress = max(step - recipe.warmup_steps, 0) / left
    return np.float32(rise * 0.5 * (1 + np.cos(np.pi * progress)))


def _rows(examples: int, batch_size: int, seed: int) -> Iterator[Int[np.ndarray, "b"]]:
    """Yields the examples of each batch, as indices: all new, or a finite set reshuffled."""
    if not examples:
        begin = 0
        while True:
            yield np.arange(begin, begin + batch_size, dtype=np.uint32)
            begin += batch_size
    if examples < batch_size:
        raise ValueError(
            f"a batch of {batch_size} needs at least {batch_size} examples, got {examples}"
        )
    random = np.random.RandomState(seed)
    while True:
        order = random.permutation(examples).astype(np.uint32)
        for begin in range(0, examples - batch_size + 1, batch_size):
            yield order[begin : begin + batch_size]
