"""A request to a ``Batcher``: what it asks for, and the tokens that come."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from memcache_jax import _checks
from memcache_jax._typing import Array, Int
from memcache_jax.generation.sampling import Sampling
from memcache_jax.serving.scores import Logprob, Scores, Scoring

Reason = Literal["length", "stop", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a request ends, besides its number of tokens.

    Attributes:
      stop_tokens: ids that end it, the last of its tokens.
      stop_texts: texts that end it, once the text of its new tokens has one of them.
    """

    stop_tokens: Sequence[int] = ()
    stop_texts: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("stop_tokens", "stop_texts"):
            given = getattr(self, name)
            if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
                raise ValueError(f"{name} must be a tuple, got {_checks.shown(given)}")
        wrong = [text for text in self.stop_texts if not (isinstance(text, str) and text)]
        if wrong:
            raise ValueError(f"stop_texts must be texts, not empty, got {_checks.shown(wrong[0])}")
        stops = tuple(_checks.check_integer("a stop token", stop, 0) for stop in self.stop_tokens)
        _checks.set_fields(self, stop_tokens=stops, stop_texts=tuple(self.stop_texts))

    def check(self, vocab: int, text_of: Callable[[list[int]], str] | None) -> None:
        """Raises ValueError for tokens beyond the vocabulary, or texts without ``text_of``."""
        if self.stop_tokens:
            of_stops = min(self.stop_tokens), max(self.stop_tokens)
            _checks.check_ids("stop_tokens", *of_stops, vocab)
        if self.stop_texts and text_of is None:
            raise ValueError("stop_texts need a batcher with text_of, the text of token ids")


class Load(NamedTuple):
    """How many requests a batcher has.

    Attributes:
      rows: those that it decodes at most.
      decoding: those that have a row, or whose last tokens are being drawn.
      reading: those whose prompt is being read, at most one.
      waiting: those that have not begun.
    """

    rows: int
    decoding: int
    reading: int
    waiting: int


class Request:
    """Tokens that continue a prompt, as they come.

    Iterate over it, with ``for`` or ``async for``, to get each new token; ``result`` waits for all.

    Attributes:
      prompt: the prompt's ids.
      max_new_tokens: the most new tokens.
      sampling: how they are drawn.
      seed: of what is drawn: equal requests with equal seeds get equal tokens.
      limits: what else ends it.
      scoring: what it tells of tokens.
      tokens: the new tokens so far.
      logprobs: how likely each was, if asked for.
      prompt_logprobs: how likely the prompt's tokens were from the second on, if asked for.
      known: how many of the prompt's tokens were known to the store.
      finish_reason: ``"length"``, ``"stop"``, ``"cancelled"`` or ``"error"``; None before its end.
      error: what went wrong, if it did.
    """

    def __init__(
        self,
        prompt: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        limits: Limits,
        scoring: Scoring,
        on_token: Callable[[int], Any] | None,
    ) -> None:
        self.prompt, self.max_new_tokens, self.seed = prompt, max_new_tokens, seed
        self.sampling, self.limits, self.scoring = sampling, limits, scoring
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.prompt_logprobs: list[Logprob] = []
        self.known = 0
        self.finish_reason: Reason | None = None
        self.error: Exception | None = None
        self._on_token = on_token
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], None]] = []
        self._cancelled = False

    @property
    def is_done(self) -> bool:
        """Whether no more tokens come."""
        return self.finish_reason is not None

    @property
    def is_cancelled(self) -> bool:
        """Whether it has been cancelled, and ends before its next token."""
        return self._cancelled

    def cancel(self) -> None:
        """Ends the request before its next token; its row is free for another."""
        self._cancelled = True

    def result(self, timeout: float | None = None) -> list[int]:
        """Waits for the end, and returns all new tokens.

        Raises:
          TimeoutError: if it takes more than so many seconds.
          Exception: what went wrong with this request.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, timeout):
                raise TimeoutError(f"the request did not end within {timeout} seconds")
        if self.error is not None:
            raise self.error
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        """The new tokens; raises what went wrong, if it did."""
        count = 0
        while not self.is_done or count < len(self.tokens):
            with self._changed:
                while not self.is_done and count == len(self.tokens):
                    self._changed.wait()
            if count < len(self.tokens):
                yield self.tokens[count]
                count += 1
        self.result()

    async def __aiter__(self) -> AsyncIterator[int]:
        """As ``iter``, within an event loop."""
        loop, event, count = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # of a loop that has closed
                loop.call_soon_threadsafe(event.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            while True:
                event.clear()
                ended = self.is_done
                while count < len(self.tokens):
                    yield self.tokens[count]
                    count += 1
                if ended:
                    break
                await event.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)
        self.result()

    # For the batcher.

    def add(self, token: int, text_of: Callable[[list[int]], str] | None) -> None:
        """Takes a new token; ends if it is the last."""
        self.tokens.append(token)
        try:
            if self._on_token is not None:
                self._on_token(token)
            ends = token in self.limits.stop_tokens or self._has_stop_text(text_of)
        except Exception as error:  # of the caller's functions
            self.end("error", error)
            return
        if ends:
            self.end("stop")
        elif len(self.tokens) == self.max_new_tokens:
            self.end("length")
        else:
            self._notify()

    def end(self, reason: Reason, error: Exception | None = None) -> None:
        """Ends the request."""
        with self._changed:
            self.finish_reason, self.error = reason, error
        self._notify()

    def _has_stop_text(self, text_of: Callable[[list[int]], str] | None) -> bool:
        texts = self.limits.stop_texts
        if not texts or text_of is None:
            return False
        # A token stands for a byte or more, so that no stop text has more tokens than bytes.
        most = max(len(text.encode()) for text in texts)
        last = text_of(self.tokens[-most:])
        return any(text in last for text in texts)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            wake()


class Call(NamedTuple):
    """Tokens of several requests, which the device may still be drawing.

    Attributes:
      requests: whose they are; None where a row has none.
      times: how many each gets.
      tokens: the tokens, (times or more, requests); -1 where logits are not finite.
      scores: how likely they are.
    """

    requests: list[Request | None]
    times: int
    tokens: Int[Array, "n b"]
    scores: Scores

    def give(self, text_of: Callable[[list[int]], str] | None) -> None:
        """Waits for the tokens, and gives them to the requests that have not ended."""
        scored = any(r is not None and r.scoring.likely is not None for r in self.requests)
        tokens, scores = jax.device_get((self.tokens, self.scores if scored else None))
        for i, of_time in enumerate(tokens[: self.times].tolist()):
            for row, (request, token) in enumerate(zip(self.requests, of_time, strict=True)):
                if request is None or request.is_done:
                    continue
                if request.is_cancelled:  # maybe by a callback, among several tokens
                    request.end("cancelled")
                elif token < 0:
                    request.end("error", FloatingPointError("the model's logits are not finite"))
                else:
                    likely = request.scoring.likely
                    if likely is not None:
                        now = jax.tree.map(lambda x, i=i: x[i], scores)
                        request.logprobs.append(now.of(row, likely))
                    request.add(token, text_of)
