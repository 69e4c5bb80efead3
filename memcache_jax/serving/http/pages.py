"""What a server answers besides completions: its model, health, metrics and tokenizer."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from memcache_jax._checks import shown
from memcache_jax.serving.batcher import Batcher
from memcache_jax.serving.http.errors import ApiError, refused
from memcache_jax.serving.http.fields import Fields
from memcache_jax.serving.http.metrics import Metrics
from memcache_jax.serving.http.protocol import Protocol

_LARGE = 1 << 15  # bytes of a body that is read in another thread


class Pages:
    """Pages about a server.

    Args:
      batcher: what it serves.
      protocol: of its model.
      metrics: what it counts.
      check_serving: raises ApiError unless requests are taken.
      running: how many are being answered.
    """

    def __init__(
        self,
        batcher: Batcher,
        protocol: Protocol,
        metrics: Metrics,
        *,
        check_serving: Callable[[], None],
        running: Callable[[], int],
    ) -> None:
        self._batcher, self._protocol, self._counted = batcher, protocol, metrics
        self._check_serving, self._running = check_serving, running
        self._began = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        """Their paths."""
        return [
            web.get("/v1/models", self._models),
            web.get("/v1/models/{name:.+}", self._model),
            web.get("/health", self._health),
            web.get("/metrics", self._metrics),
            web.post("/tokenize", self._tokenize),
            web.post("/detokenize", self._detokenize),
            web.get("/tokenizer_info", self._tokenizer_info),
        ]

    async def _models(self, http: web.Request) -> web.Response:
        return web.json_response(dict(object="list", data=[self._description]))

    async def _model(self, http: web.Request) -> web.Response:
        self._protocol.check_model(http.match_info["name"])
        return web.json_response(self._description)

    @property
    def _description(self) -> dict[str, Any]:
        protocol = self._protocol
        about = dict(id=protocol.model, object="model", created=self._began)
        return about | dict(owned_by="memcache_jax", max_model_len=protocol.max_length)

    async def _health(self, http: web.Request) -> web.Response:
        self._check_serving()
        return web.json_response(dict(status="ok"))

    async def _metrics(self, http: web.Request) -> web.Response:
        load, store = self._batcher.load, self._batcher.store
        gauges = [
            ("memcache_rows", "Requests that are decoded at most.", load.rows),
            ("memcache_rows_decoding", "Requests that are decoded.", load.decoding),
            ("memcache_prompts_reading", "Prompts that are being read.", load.reading),
            ("memcache_queue_waiting", "Requests that wait for a row.", load.waiting),
            ("memcache_http_running", "Requests that are being answered.", self._running()),
            ("memcache_store_bytes", "Of the prefix store.", 0 if store is None else store.nbytes),
        ]
        text = self._counted.text(gauges)
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _tokenize(self, http: web.Request) -> web.Response:
        vocabulary = self._protocol.vocabulary

        def parse(body: Any) -> list[int]:
            fields = Fields(body)
            text = fields.text("prompt", "")
            fields.ignored("model")
            if fields.flag("add_special_tokens"):
                raise refused("no special tokens are added here", "add_special_tokens")
            fields.end()
            if text == vocabulary.end:  # so that clients learn the id of the token of that name
                return [vocabulary.tokenizer.eos_id]
            return vocabulary.tokenizer.encode(text.encode()).tolist()

        tokens = await parsed(http, parse)
        length = self._protocol.max_length
        return web.json_response(dict(tokens=tokens, count=len(tokens), max_model_len=length))

    async def _detokenize(self, http: web.Request) -> web.Response:
        def parse(body: Any) -> str:
            fields = Fields(body)
            tokens = fields.take("tokens")
            fields.ignored("model")
            fields.end()
            return "" if tokens == [] else self._protocol.ids("tokens", tokens)[1]

        return web.json_response(dict(prompt=await parsed(http, parse)))

    async def _tokenizer_info(self, http: web.Request) -> web.Response:
        template = self._protocol.template
        source = None if template is None else template.source
        about = dict(eos_token=self._protocol.vocabulary.end, bos_token=None, chat_template=source)
        return web.json_response(about)


async def parsed(http: web.Request, parse: Callable[[Any], Any]) -> Any:
    """What a request's body asks for.

    Raises:
      ApiError: if it is no JSON, or by ``parse``.
    """
    if http.content_type != "application/json":
        raise ApiError(
            415,
            "the body must be JSON, with the header Content-Type: application/json, got "
            f"{shown(http.content_type)}",
        )
    raw = await http.read()

    def read() -> Any:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise refused(f"the body is not JSON: {error}") from error
        return parse(body)

    return read() if len(raw) < _LARGE else await asyncio.to_thread(read)
