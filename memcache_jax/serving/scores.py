"""How likely tokens are, as a ``Batcher`` tells of those it draws and of prompts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax import _checks
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.generation.apart import Frame

MOST_LIKELY = 20
"""The most tokens of a place that are told."""


class Logprob(NamedTuple):
    """How likely a token was.

    Attributes:
      value: its log-probability, in nats, of the model's logits: before temperature and limits.
      likely: the most likely tokens at its place and their log-probabilities, best first.
    """

    value: float
    likely: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What a request wants to know of tokens.

    Attributes:
      likely: how many of the most likely tokens to tell beside each new one; None tells nothing.
      prompt: whether to tell the same of the prompt's tokens, from the second on.
    """

    likely: int | None = None
    prompt: bool = False

    def __post_init__(self) -> None:
        options: Any = dict(most=MOST_LIKELY, optional=True)
        likely = _checks.check_integer("logprobs", self.likely, 0, **options)
        _checks.set_fields(self, likely=likely)
        if _checks.check_flag("score_prompt", self.prompt) and likely is None:
            raise ValueError("score_prompt needs logprobs, how many tokens to tell at each place")


class Scores(NamedTuple):
    """Of one place in each row.

    Attributes:
      chosen: the log-probability of the token that is there.
      ids: the most likely tokens, best first.
      likely: their log-probabilities.
    """

    chosen: Float[Array, "b"]
    ids: Int[Array, "b k"]
    likely: Float[Array, "b k"]

    def of(self, row: int, count: int) -> Logprob:
        """Those of a row, with so many of the most likely tokens; of arrays on the host."""
        ids, likely = self.ids[row, :count].tolist(), self.likely[row, :count].tolist()
        return Logprob(float(self.chosen[row]), tuple(zip(ids, likely, strict=True)))


def scores_of(logits: Float[Array, "b vocab"], tokens: Int[Array, "b"]) -> Scores:
    """The scores of tokens that follow."""
    values = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(values, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    likely, ids = lax.top_k(values, min(MOST_LIKELY, values.shape[-1]))
    return Scores(chosen, ids.astype(jnp.int32), likely)


def scores_if(
    wanted: Bool[Array, ""], logits: Callable[[], Array], tokens: Int[Array, "b"]
) -> Scores:
    """The scores, or zeros at no cost where they are not wanted."""

    def scores() -> Scores:
        return scores_of(logits(), tokens)

    def none() -> Scores:
        shapes: Any = jax.eval_shape(scores)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return lax.cond(wanted, scores, none)


def read(
    state: Any,
    prompt: Int[np.ndarray, "n"],
    begin: int,
    end: int,
    cache: Any,
    *,
    graph: Frame,
    scored: bool,
) -> tuple[Any, Float[Array, "1 vocab"], Scores | None]:
    """Extends a cache by a piece of a prompt.

    Returns the cache, the logits after the piece, and with ``scored`` the scores of each token's
    successor, on the host; the score after the prompt's last token has no meaning.
    """
    following = np.zeros(end - begin, np.int32)
    known = prompt[begin + 1 : end + 1]
    following[: len(known)] = known
    tokens = jnp.asarray(prompt[None, begin:end])
    cache, logits, scores = read_piece(state, tokens, following, scored, cache, graph=graph)
    return cache, logits, jax.device_get(scores) if scored else None


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def read_piece(
    state: Any,
    tokens: Array,
    following: Array,
    scored: Bool[Array, ""],
    cache: Any,
    *,
    graph: Frame,
) -> tuple[Any, Float[Array, "1 vocab"], Scores]:
    """``read`` on the device: one program for prompts with scores and without."""
    model = graph.merge(state)
    hidden, cache = model.extend(tokens, cache)
    return (
        cache,
        model.logits(hidden[:, -1]),
        scores_if(scored, lambda: model.logits(hidden[0]), following),
    )
