"""Bodies and chunks of answers, in the forms of OpenAI's completions and chats."""

import itertools
import time
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from memcache_jax.serving.http.choices import Piece
from memcache_jax.serving.http.text import Vocabulary
from memcache_jax.serving.scores import Logprob


class Answers:
    """The answers to one request.

    Attributes:
      kind: of a whole answer.
      chunk_kind: of a part of it.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, vocabulary: Vocabulary, scored: bool) -> None:
        self._vocabulary, self._scored = vocabulary, scored
        self._head = dict(id=f"{self.prefix}-{uuid.uuid4().hex}", created=int(time.time()))
        self._head["model"] = model
        self._begun: set[int] = set()

    def whole(self, choices: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """The body, of each choice's pieces."""
        made = [self.choice(i, _joined(pieces)) for i, pieces in enumerate(choices)]
        return dict(object=self.kind, **self._head, choices=made, usage=usage)

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """The event of a piece; None if it tells nothing."""
        first = index not in self._begun
        if not (piece.text or piece.finish_reason or (self._scored and piece.tokens)):
            return None
        self._begun.add(index)
        return self._event([self.part(index, piece, first)])

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The event that tells the numbers of tokens."""
        return dict(**self._event([]), usage=usage)

    def _event(self, choices: list[Any]) -> dict[str, Any]:
        return dict(object=self.chunk_kind, **self._head, choices=choices)

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def part(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """A part of one."""
        raise NotImplementedError


class Completions(Answers):
    """``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole answer, or a part: both have one form."""
        logprobs = self._logprobs(piece) if self._scored else None
        return dict(
            text=piece.text, index=index, logprobs=logprobs, finish_reason=piece.finish_reason
        )

    def part(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """A part of an answer."""
        return self.choice(index, piece)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        return dict(
            tokens=[self._vocabulary.name(token) for token in piece.tokens],
            token_logprobs=[None if x is None else x.value for x in piece.logprobs],
            top_logprobs=[
                None if x is None else self._top(token, x)
                for token, x in zip(piece.tokens, piece.logprobs, strict=True)
            ],
            text_offset=list(piece.offsets),
        )

    def _top(self, token: int, logprob: Logprob) -> dict[str, float]:
        """The likely tokens and the one that came, by name; by id where names are the same."""
        told: dict[str, float] = {}
        likely = dict(logprob.likely)
        for each, value in ({token: logprob.value} | likely).items():
            name = self._vocabulary.name(each)
            told[f"token_id:{each}" if name in told else name] = value
        return told


class Chats(Answers):
    """``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole answer."""
        message = dict(role="assistant", content=piece.text, refusal=None)
        return dict(index=index, message=message, **self._rest(piece))

    def part(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """A part of one; the first tells the role."""
        delta = dict(role="assistant") if first else {}
        return dict(index=index, delta=delta | dict(content=piece.text), **self._rest(piece))

    def _rest(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece) if self._scored else None
        return dict(logprobs=logprobs, finish_reason=piece.finish_reason)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        content = [
            dict(
                **self._told(token, x.value),
                top_logprobs=[self._told(*each) for each in x.likely],
            )
            for token, x in zip(piece.tokens, piece.logprobs, strict=True)
            if x is not None
        ]
        return dict(content=content, refusal=None)

    def _told(self, token: int, value: float) -> dict[str, Any]:
        name = self._vocabulary.name(token)
        is_text = not name.startswith("token_id:")
        return dict(token=name, logprob=value, bytes=list(name.encode()) if is_text else None)


def _joined(pieces: Sequence[Piece]) -> Piece:
    def chained(name: str) -> tuple:
        return tuple(itertools.chain.from_iterable(getattr(piece, name) for piece in pieces))

    return Piece(
        text="".join(piece.text for piece in pieces),
        tokens=chained("tokens"),
        logprobs=chained("logprobs"),
        offsets=chained("offsets"),
        new=sum(piece.new for piece in pieces),
        finish_reason=pieces[-1].finish_reason,
    )
