"""Drafts of next tokens, which a model then verifies all at once."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._checks import check_instance, check_integer, set_fields
from memcache_jax._typing import Array, Float, Int
from memcache_jax.generation.apart import Frame, apart
from memcache_jax.generation.prefill import prefill
from memcache_jax.generation.sampling import probabilities, sample
from memcache_jax.nn import LanguageModel


class Draft(abc.ABC):
    """What proposes ``tokens`` next tokens of each row.

    Attributes:
      tokens: how many are proposed at most, and verified in one call of the model.
    """

    tokens: int

    @abc.abstractmethod
    def split(self) -> tuple[Any, Any]:
        """This draft without its arrays, hashable, and the arrays; ``merge`` joins them."""

    @abc.abstractmethod
    def start(self, prompt: Int[Array, "b t"], lengths: Int[Array, "b"], size: int) -> Any:
        """The past after prompts but for what follows them, with room for ``size`` tokens."""

    @abc.abstractmethod
    def propose(
        self,
        past: Any,
        known: Int[Array, "b size"],
        count: Int[Array, "b"],
        most: Int[Array, "b"],
        key: Array,
        numbers: tuple[Any, Any],
        vocab: int,
        **sampling: Any,
    ) -> tuple[Int[Array, "b k"], Float[Array, "b k vocab"], Int[Array, "b"], Any]:
        """Returns the next tokens, their probabilities, how many count in each row, and the past.

        The probabilities are those that the tokens were drawn with; at most ``most`` count.

        Args:
          past: of ``start``, or ``keep``: of all known tokens but the last.
          known: the tokens of each row.
          count: how many are known.
          most: how many of the proposed tokens count; below 0 for rows that have ended.
          key: a random key.
          numbers: how to draw, as for ``sample``.
          vocab: number of token ids.
          sampling: likewise.
        """

    def keep(self, past: Any, dropped: Int[Array, "b"]) -> Any:
        """The past without the last proposed tokens."""
        del dropped
        return past


@dataclasses.dataclass(frozen=True)
class NGrams(Draft):
    """Proposes what followed the last tokens where they stood before: prompt lookup.

    The place is the one with the longest match before it, up to ``longest`` tokens; of several, the
    last. It proposes as many tokens as matched, since a long match is likelier to continue, and
    ``tokens`` if ``longest`` matched. If fewer than ``shortest`` match, nothing is proposed, and
    the model takes a single token as without a draft. N-grams need no second model, and pay off
    where text repeats itself: code, quotations, edits.

    Attributes:
      tokens: most tokens that are proposed. With 15, two calls take a chunk of 32 tokens of a deep
        memory.
      longest: how many tokens before a place are compared.
      shortest: how many must be the same, by default 3, or ``longest`` where that is less. Raise it
        where proposals are rarely kept.

    Raises:
      ValueError: for numbers below 1, or a ``shortest`` above ``longest``.
    """

    tokens: int = 15
    longest: int = 8
    shortest: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "longest"):
            set_fields(self, **{name: check_integer(name, getattr(self, name))})
        if self.shortest is None:
            return
        set_fields(self, shortest=check_integer("shortest", self.shortest))
        if self.shortest > self.longest:
            raise ValueError(
                f"shortest must be at most longest={self.longest}, got {self.shortest}"
            )

    @property
    def _needed(self) -> int:
        """How many tokens must match."""
        return min(3, self.longest) if self.shortest is None else self.shortest

    def split(self) -> tuple[Any, Any]:
        """As ``Draft.split``; it has no arrays."""
        return self, None

    def start(self, prompt: Int[Array, "b t"], lengths: Int[Array, "b"], size: int) -> Any:
        """As ``Draft.start``; it has no past."""
        return None

    def propose(
        self,
        past: Any,
        known: Int[Array, "b size"],
        count: Int[Array, "b"],
        most: Int[Array, "b"],
        key: Array,
        numbers: tuple[Any, Any],
        vocab: int,
        **sampling: Any,
    ) -> tuple[Int[Array, "b k"], Float[Array, "b k vocab"], Int[Array, "b"], Any]:
        """As ``Draft.propose``: each token has probability 1."""
        tokens, alike = jax.vmap(self._following)(known, count)
        trusted = jnp.where(alike < self.longest, alike, self.tokens)
        trusted = jnp.where(alike < self._needed, 0, trusted)
        return tokens, jax.nn.one_hot(tokens, vocab), jnp.minimum(most, trusted), past

    def _following(
        self, known: Int[Array, "size"], count: Int[Array, ""]
    ) -> tuple[Int[Array, "k"], Int[Array, ""]]:
        """What followed the best match, and the length of that match."""
        place = jnp.arange(len(known))
        same, alike = jnp.ones(len(known), bool), jnp.zeros(len(known), jnp.int32)
        for ago in range(self.longest):
            there = jnp.roll(known, ago) == known[count - 1 - ago]
            same &= there & (place >= ago) & (count > ago)
            alike += same
        earlier = place < count - 1
        best = jnp.argmax(jnp.where(earlier, alike * len(known) + place, -1))
        # Beyond what is known the text goes round: it is as long as the way back to the place.
        round_trip = jnp.maximum(count - 1 - best, 1)
        begin = jnp.minimum(best + 1, count - 1)
        return known[begin + jnp.arange(self.tokens) % round_trip], jnp.where(
            earlier[best], alike[best], 0
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DraftModel(Draft):
    """Proposes the tokens that a smaller model of the same vocabulary draws.

    Attributes:
      model: the model.
      tokens: how many tokens are proposed.

    Raises:
      ValueError: for another model, or a number below 1.
    """

    model: LanguageModel
    tokens: int = 4

    def __post_init__(self) -> None:
        check_instance("model", self.model, LanguageModel, "an mc.nn.LanguageModel")
        set_fields(self, tokens=check_integer("tokens", self.tokens))

    def split(self) -> tuple[Any, Any]:
        """As ``Draft.split``."""
        frame, arrays = apart(self.model)
        return _Graph(frame, self.tokens), arrays

    def start(self, prompt: Int[Array, "b t"], lengths: Int[Array, "b"], size: int) -> Any:
        """As ``Draft.start``."""
        cache = self.model.init_cache(len(prompt), size, rewind=self.tokens)
        return prefill(self.model, prompt, cache, lengths)[1]

    def propose(
        self,
        past: Any,
        known: Int[Array, "b size"],
        count: Int[Array, "b"],
        most: Int[Array, "b"],
        key: Array,
        numbers: tuple[Any, Any],
        vocab: int,
        **sampling: Any,
    ) -> tuple[Int[Array, "b k"], Float[Array, "b k vocab"], Int[Array, "b"], Any]:
        """As ``Draft.propose``."""

        def step(carry: tuple, i: Array) -> tuple[tuple, tuple]:
            cache, last = carry
            hidden, cache = self.model.extend(last[:, None], cache, (i <= most).astype(jnp.int32))
            logits = self.model.logits(hidden[:, 0])
            token = sample(jax.random.fold_in(key, i), logits, numbers, **sampling)
            return (cache, token), (token, probabilities(logits, numbers, **sampling))

        last = jnp.take_along_axis(known, count[:, None] - 1, axis=1)[:, 0]
        # The last step draws nothing that is used, but takes the last token.
        (past, _), drawn = lax.scan(step, (past, last), jnp.arange(self.tokens + 1))
        tokens, chances = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1)[:, :-1], drawn)
        return tokens, chances, most, past

    def keep(self, past: Any, dropped: Int[Array, "b"]) -> Any:
        """As ``Draft.keep``."""
        return past.rewind(dropped)


@dataclasses.dataclass(frozen=True)
class _Graph:
    """A ``DraftModel`` without its arrays."""

    frame: Frame
    tokens: int


def merge(draft: Any, state: Any) -> Draft:
    """The draft of these parts, as ``Draft.split`` returns them."""
    if isinstance(draft, _Graph):
        return DraftModel(draft.frame.merge(state), draft.tokens)
    return draft
