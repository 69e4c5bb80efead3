"""OpenAI's HTTP API over a batcher: an application of aiohttp."""

import asyncio
import contextlib
import json
import logging
import queue
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

from aiohttp import web

from memcache_jax import _checks
from memcache_jax.serving.batcher import Batcher
from memcache_jax.serving.http.answers import Answers, Chats, Completions
from memcache_jax.serving.http.chat import ChatTemplate
from memcache_jax.serving.http.choices import Piece, pieces, take_all
from memcache_jax.serving.http.errors import ApiError
from memcache_jax.serving.http.metrics import Metrics
from memcache_jax.serving.http.pages import Pages, parsed
from memcache_jax.serving.http.protocol import Asked, Limits, Protocol
from memcache_jax.serving.http.text import Tokenizer, Vocabulary
from memcache_jax.serving.request import Request

_LOG = logging.getLogger(__name__)
_SEEDS = 2**31
_NO_CLIENT = 499  # the status that is counted for clients that go before the answer


class Server:
    """Serves a batcher's model as OpenAI's API does.

    ``app()`` is an application for any runner of aiohttp, and ``listening`` one that this package
    has. The batcher's thread must take steps: use it as a context around.

    Args:
      batcher: of the model.
      tokenizer: its tokenizer, such as those of ``mc.training``.
      model: the name that clients give.
      template: of chats; without one they are refused.
      limits: of requests.

    Attributes:
      batcher: of the model.
      metrics: what has been counted.
      open: how many requests are being answered.

    Raises:
      ValueError: for arguments of another kind.

    Example:
      >>> import asyncio
      >>> from memcache_jax.serving.http import Server, listening
      >>> async def main(batcher, tokenizer):
      ...     with batcher:
      ...         async with listening(Server(batcher, tokenizer), "127.0.0.1", 8000):
      ...             await asyncio.Event().wait()
    """

    def __init__(
        self,
        batcher: Batcher,
        tokenizer: Tokenizer,
        *,
        model: str = "memcache_jax",
        template: ChatTemplate | None = None,
        limits: Limits | None = None,
    ) -> None:
        _checks.check_instance("batcher", batcher, Batcher, "an mc.Batcher")
        wanted = "a tokenizer with encode, decode and eos_id"
        _checks.check_instance("tokenizer", tokenizer, Tokenizer, wanted)
        _checks.check_instance("model", model, str, "a name")
        kinds = (ChatTemplate, type(None))
        _checks.check_instance("template", template, kinds, "a ChatTemplate")
        limits = Limits() if limits is None else limits
        _checks.check_instance("limits", limits, Limits, "Limits(...)")
        self.batcher, self.metrics = batcher, Metrics()
        self._vocabulary = Vocabulary(tokenizer)
        size = batcher.model.config.vocab_size
        if not 0 <= tokenizer.eos_id < size:
            raise ValueError(
                f"the tokenizer's eos_id must be an id of the model, from 0 to {size - 1}, got "
                f"{tokenizer.eos_id}"
            )
        options: Any = dict(limits=limits, template=template)
        self._protocol = Protocol(model, self._vocabulary, size, batcher.max_length, **options)
        self._running: set[Request] = set()
        self.open, self._stopping = 0, False

    def app(self) -> web.Application:
        """The application."""
        size = self._protocol.limits.body
        app = web.Application(middlewares=[self._middleware], client_max_size=size)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chats)
        pages = Pages(
            *(self.batcher, self._protocol, self.metrics),
            check_serving=self._check_serving,
            running=lambda: self.open,
        )
        app.add_routes(pages.routes())
        return app

    async def stop(self, grace: float) -> None:
        """Refuses what comes, and waits for what runs; cancels it after so many seconds."""
        self._stopping = True
        end = time.monotonic() + grace
        while self.open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for request in self._running:
            request.cancel()
        while self.open and time.monotonic() < end + 5:  # for clients to be told
            await asyncio.sleep(0.02)

    # Answers.

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, self._protocol.completion, Completions)

    async def _chats(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, self._protocol.chat, Chats)

    async def _answer(
        self, http: web.Request, parse: Callable[[Any], Asked], form: type[Answers]
    ) -> web.StreamResponse:
        began = time.monotonic()
        self._check_serving()
        asked = await parsed(http, parse)
        self._check_serving()
        self.open += 1
        try:
            with self._submitted(asked) as requests:
                answers = form(self._protocol.model, self._vocabulary, asked.logprobs is not None)
                streams = [
                    self._counted(request, asked, i, began) for i, request in enumerate(requests)
                ]
                if asked.stream:
                    return await self._stream(http, asked, requests, streams, answers)
                told: list[list[Piece]] = [[] for _ in streams]

                async def take(index: int, piece: Piece) -> None:
                    told[index].append(piece)

                new = await take_all(streams, take)
                return web.json_response(answers.whole(told, _usage(asked, requests, new)))
        finally:
            self.open -= 1

    async def _stream(
        self,
        http: web.Request,
        asked: Asked,
        requests: list[Request],
        streams: list[AsyncGenerator[Piece, None]],
        answers: Answers,
    ) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers)

        async def tell(event: Any) -> None:
            text = event if isinstance(event, str) else json.dumps(event)
            await response.write(f"data: {text}\n\n".encode())

        async def take(index: int, piece: Piece) -> None:
            chunk = answers.chunk(index, piece)
            if chunk is not None:
                await tell(chunk)

        try:
            await response.prepare(http)
            new = await take_all(streams, take)
            if asked.usage:
                await tell(answers.usage(_usage(asked, requests, new)))
            await tell("[DONE]")
        except ConnectionError:  # the client has gone
            raise
        except Exception as error:  # the status has been sent: the stream says it
            with contextlib.suppress(ConnectionError):
                await tell(_as_api_error(error).body)
        return response

    @contextlib.contextmanager
    def _submitted(self, asked: Asked) -> Iterator[list[Request]]:
        """The choices' requests, which are cancelled if the answer ends before them."""
        end = (self._vocabulary.tokenizer.eos_id,) if asked.ends else ()
        scored = asked.echo and asked.logprobs is not None
        common: dict[str, Any] = dict(logprobs=asked.logprobs, score_prompt=scored)
        common |= dict(stop_tokens=end, **asked.sampling)
        requests: list[Request] = []
        try:
            for i in range(asked.n * len(asked.prompts)):
                prompt, seed = asked.prompts[i // asked.n].ids, (asked.seed + i % asked.n) % _SEEDS
                new = max(1, asked.max_tokens)
                requests.append(self.batcher.submit(prompt, new, seed=seed, **common))
                self._running.add(requests[-1])
            for prompt in asked.prompts:
                self.metrics.prompt_tokens.add(len(prompt.ids))
            yield requests
        except queue.Full as error:
            message = f"the queue is full: {error}"
            raise ApiError(429, message, code="queue_full", retry_after=1) from error
        finally:
            for request in requests:
                request.cancel()
                self._running.discard(request)

    async def _counted(
        self, request: Request, asked: Asked, choice: int, began: float
    ) -> AsyncGenerator[Piece, None]:
        """A choice's pieces, counted."""
        reason = "cancelled"
        try:
            first = True
            made = pieces(request, asked.prompts[choice // asked.n], asked, self._vocabulary)
            async with contextlib.aclosing(made) as told:
                async for piece in told:
                    if first:
                        self.metrics.first.observe(time.monotonic() - began)
                        if choice % asked.n == 0:  # prompts are counted once too
                            self.metrics.known_tokens.add(request.known)
                    first = False
                    self.metrics.new_tokens.add(piece.new)
                    reason = piece.finish_reason or reason
                    yield piece
            self.metrics.whole.observe(time.monotonic() - began)
        except Exception:
            reason = "error"
            raise
        finally:
            self.metrics.ends.add(1, reason)

    def _check_serving(self) -> None:
        if self._stopping:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=5)
        if not self.batcher.is_serving:
            raise ApiError(503, "the model is not served: see the server's log", code="not_serving")

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        status = _NO_CLIENT
        try:
            response = await handler(request)
            status = response.status
            return response
        except ConnectionError:
            return web.Response(status=status)  # which aiohttp drops
        except web.HTTPException as error:
            response = _response(_of_http(error, request))
            status = response.status
            return response
        except Exception as error:
            response = _response(_as_api_error(error))
            status = response.status
            return response
        finally:
            resource = request.match_info.route.resource
            path = "other" if resource is None else resource.canonical
            self.metrics.requests.add(1, path, status)


def _usage(asked: Asked, requests: list[Request], new: int) -> dict[str, Any]:
    prompt = sum(len(prompt.ids) for prompt in asked.prompts)
    known = sum(request.known for request in requests[:: asked.n])
    return dict(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=dict(cached_tokens=known),
    )


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, f"{type(error).__name__}: {error}")


def _of_http(error: web.HTTPException, http: web.Request) -> ApiError:
    """An error of aiohttp's, such as of a path that is not there."""
    reasons = {404: "there is no", 405: f"{http.method} is not a method of"}
    told = f"{reasons[error.status]} {http.path!r:.100}" if error.status in reasons else error.text
    return ApiError(error.status, told or error.reason)


def _response(error: ApiError) -> web.Response:
    return web.json_response(error.body, status=error.status, headers=error.headers)
