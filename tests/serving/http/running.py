"""A server of a tiny model, in a thread of this process."""

import asyncio
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from flax import nnx

import memcache_jax as mc
from memcache_jax.serving.http import PLAIN, ChatTemplate, Limits, Server, listening
from memcache_jax.training.tokenizers import ByteTokenizer

ROWS, LENGTH, PIECE = 16, 128, 4


@functools.cache
def model():
    mixer = mc.nn.MemoryCachingMixer(mc.memories.LinearAttention(), segmentation=mc.Constant(8))
    config = mc.nn.LanguageModelConfig(257, 1, features=16, num_heads=2, mixers=(mixer,))
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    model.head.kernel[...] = 20 * model.head.kernel[...]
    return model


@contextlib.contextmanager
def running(*, rows=ROWS, grace=30.0, **options: Any) -> Iterator[tuple[str, Server, Any]]:
    """The address of a server, the server, and what begins its end."""
    limits = options.pop("limits", Limits(body=20_000, new_tokens=100))
    batcher = mc.Batcher(model(), rows=rows, max_length=LENGTH, piece=PIECE, **options)
    template = ChatTemplate(PLAIN)
    server = Server(batcher, ByteTokenizer(), model="tiny", template=template, limits=limits)
    told: queue.Queue[Any] = queue.Queue()

    async def main():
        stop = asyncio.Event()
        async with listening(server, port=0, grace=grace) as port:
            told.put((f"http://127.0.0.1:{port}", asyncio.get_running_loop(), stop))
            await stop.wait()

    with batcher:
        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        address, loop, stop = told.get(timeout=60)
        try:
            yield address, server, lambda: loop.call_soon_threadsafe(stop.set)
        finally:
            with contextlib.suppress(RuntimeError):  # of a loop that has ended
                loop.call_soon_threadsafe(stop.set)
            thread.join()


@contextlib.contextmanager
def slowly(server, seconds=0.03) -> Iterator[None]:
    """Makes each step of a server's batcher take longer."""
    step = server.batcher.step

    def slow():
        time.sleep(seconds)
        return step()

    server.batcher.step = slow
    yield
    del server.batcher.step
