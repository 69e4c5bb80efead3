"""An answer as it comes, from a batcher's tokens to pieces of text."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import NamedTuple

from memcache_jax.serving.http.errors import ApiError
from memcache_jax.serving.http.protocol import Asked, Prompt
from memcache_jax.serving.http.text import Detokenizer, Stops, Vocabulary
from memcache_jax.serving.request import Request
from memcache_jax.serving.scores import Logprob


class Piece(NamedTuple):
    """A part of an answer.

    Attributes:
      text: never ends within a character.
      tokens: those that it came with, of the prompt and new ones.
      logprobs: of each, if asked for; None of a prompt's first token.
      offsets: where each begins, in characters of the whole answer.
      new: how many of the tokens are new ones.
      finish_reason: ``"stop"`` or ``"length"`` with the last piece.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob | None, ...] = ()
    offsets: tuple[int, ...] = ()
    new: int = 0
    finish_reason: str | None = None


async def pieces(
    request: Request, prompt: Prompt, asked: Asked, vocabulary: Vocabulary
) -> AsyncGenerator[Piece, None]:
    """An answer's pieces; the request is cancelled once a text has ended it.

    Raises:
      ApiError: if the request was cancelled.
      Exception: what went wrong with it.
    """
    decode = vocabulary.tokenizer.decode
    text, stops = Detokenizer(decode, prompt.ids), Stops(asked.stops)
    scored, offset, place = asked.logprobs is not None, 0, 0
    async with contextlib.aclosing(_tokens(request)) as tokens:
        async for token in tokens:
            if asked.echo and not place:
                yield _echo(request, prompt, decode, scored)
                offset = len(prompt.text)
            place += 1
            if not asked.max_tokens:
                continue
            told, stopped = stops.add(text.add(token))
            logprobs = (request.logprobs[place - 1],) if scored else ()
            reason = "stop" if stopped else None
            yield Piece(told, (token,), logprobs, (offset,), 1, reason)
            offset += len(told)
            if stopped:
                request.cancel()
                return
    if request.finish_reason == "cancelled":
        raise ApiError(503, "the server is stopping", retry_after=5)
    if not asked.max_tokens:
        yield Piece("", finish_reason="length")
        return
    told, stopped = stops.add(text.end())
    if not stopped:
        told += stops.end()
    yield Piece(told, finish_reason="stop" if stopped else request.finish_reason)


def _echo(request: Request, prompt: Prompt, decode: Callable, scored: bool) -> Piece:
    if not scored:
        return Piece(prompt.text)
    text, offsets, offset = Detokenizer(decode), [], 0
    tokens = tuple(prompt.ids.tolist())
    for token in tokens:
        offsets.append(offset)
        offset += len(text.add(token))
    return Piece(prompt.text, tokens, (None, *request.prompt_logprobs), tuple(offsets))


async def _tokens(request: Request) -> AsyncGenerator[int, None]:
    async for token in request:
        yield token


async def take_all(
    streams: Sequence[AsyncGenerator[Piece, None]], take: Callable[[int, Piece], Awaitable[None]]
) -> int:
    """Takes the pieces of all answers as they come, each with its index; counts new tokens."""
    counts = [0] * len(streams)

    async def follow(index: int, stream: AsyncGenerator[Piece, None]) -> None:
        async with contextlib.aclosing(stream):
            async for piece in stream:
                counts[index] += piece.new
                await take(index, piece)

    if len(streams) == 1:
        await follow(0, streams[0])
        return counts[0]
    try:
        async with asyncio.TaskGroup() as group:
            for index, stream in enumerate(streams):
                group.create_task(follow(index, stream))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return sum(counts)
