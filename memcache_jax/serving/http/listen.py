"""A server's socket and its shutdown."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from memcache_jax.serving.http.server import Server

_BACKLOG = 1024


@contextlib.asynccontextmanager
async def listening(
    server: Server, host: str = "127.0.0.1", port: int = 8000, *, grace: float = 30.0
) -> AsyncIterator[int]:
    """Answers at an address; at the end refuses new requests and finishes those that run.

    Clients that disconnect cancel their requests.

    Args:
      server: what answers.
      host: by default this machine alone.
      port: 0 for any that is free.
      grace: seconds that requests have to finish; then they are cancelled.

    Yields:
      The port.

    Raises:
      OSError: if the address cannot be used.
    """
    options: dict = dict(handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    runner = web.AppRunner(server.app(), **options)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=_BACKLOG)
        await site.start()
        yield runner.addresses[0][1]
        await server.stop(grace)
    finally:
        await runner.cleanup()


def serve(
    server: Server,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    grace: float = 30.0,
    ready: Callable[[int], None] = lambda port: None,
) -> None:
    """Answers until SIGTERM or SIGINT, in the main thread; a second one ends at once.

    Args:
      server: as for ``listening``, as are host, port and grace.
      host: see server.
      port: see server.
      grace: see server.
      ready: is called with the port once it answers.
    """

    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        async with listening(server, host, port, grace=grace) as bound:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, _stop, loop, stop)
            ready(bound)
            await stop.wait()

    asyncio.run(main())


def _stop(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    stop.set()
