"""Many requests at once, in the rows of one cache: continuous batching."""

import collections
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax import _checks
from memcache_jax.generation.apart import apart
from memcache_jax.generation.sampling import Sampling
from memcache_jax.nn import LanguageModel
from memcache_jax.nn.unrolled import for_steps
from memcache_jax.serving.ids import Ids, as_ids
from memcache_jax.serving.prefix_store import PrefixStore
from memcache_jax.serving.programs import Draws, begin, decode, on_device_of, whole_on_mesh_of
from memcache_jax.serving.reading import LEAST, Reading
from memcache_jax.serving.request import Call, Limits, Load, Request
from memcache_jax.serving.scores import Scoring
from memcache_jax.streaming.loops import Slim


class Batcher:
    """Serves requests that come and go at any time, in the rows of one cache.

    A step reads pieces of prompts, one prompt after the other, each in a cache of its own, and then
    appends one token to each row that has a request, or up to ``ahead`` if no prompt can be read.
    While the device does so, the step gives out the tokens of the one before. So between two of its
    tokens, a request waits for at most ``piece`` prompt tokens, where a piece shorter than 16
    counts as 16; requests get rows in the order they came. Piece sizes are powers of two:
    log2(piece) + 4 programs are compiled in all, each once.

    A request's tokens depend on nothing but it: not on its row, nor on what else is served. With a
    store that is so up to rounding: where the beginning of a prompt is known, the rest is read in
    other pieces. What goes wrong with one, in its callback or as NaN, ends that request alone.

    A thread does not see contexts such as ``jax.set_mesh``: set them for all threads, or call
    ``run`` within them.

    Call ``step`` or ``run`` yourself, or use the batcher as a context, in which a thread does.

    Args:
      model: the model; the batcher does not see later changes of its parameters.
      rows: the most requests that are decoded at once.
      max_length: most tokens of a prompt and what follows it.
      piece: most prompt tokens in a step, a power of two.
      ahead: most tokens per row in a step in which no prompt can be read, 1 or more. They take one
        device call and arrive together; what a row draws after its request's end is discarded.
      most_waiting: most requests that wait for a row; more are refused.
      store: where beginnings of prompts are looked up, and prompts' caches inserted.
      text_of: the text of token ids, for ``stop_texts``.
      cache: options of ``mc.init_cache``.

    Raises:
      ValueError: for another model, numbers out of range, or options that do not fit the model.

    Example:
      >>> import memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=1, features=32, num_heads=2)
      >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
      >>> batcher = mc.Batcher(model, rows=2, max_length=100)
      >>> requests = [batcher.submit([7, 8, 9][:n], max_new_tokens=4) for n in (1, 2, 3)]
      >>> batcher.run()
      >>> [len(request.tokens) for request in requests]
      [4, 4, 4]
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        rows: int,
        max_length: int,
        piece: int = 128,
        ahead: int = 1,
        most_waiting: int = 1024,
        store: PrefixStore | None = None,
        text_of: Callable[[list[int]], str] | None = None,
        cache: dict[str, Any] | None = None,
    ) -> None:
        _checks.check_instance("model", model, LanguageModel, "an mc.nn.LanguageModel")
        rows, max_length = _checks.check_sizes(rows=rows, max_length=max_length)
        self.piece = _checks.check_integer("piece", piece)
        if self.piece & (self.piece - 1):
            raise ValueError(f"piece must be a power of two, got {piece}")
        self.ahead = _checks.check_integer("ahead", ahead)
        self.most_waiting = _checks.check_integer("most_waiting", most_waiting)
        if store is not None:
            _checks.check_instance("store", store, PrefixStore, "an mc.PrefixStore")
        _checks.check_function("text_of", text_of, "token ids")
        self.model, self.max_length, self.store, self.text_of = model, max_length, store, text_of
        self._graph, self._state = apart(model)
        options = _checks.check_mapping("cache", cache)
        self._empty = on_device_of(self._state, model.init_cache(1, max_length, **options))
        steps: Any = model if "sharding" in options else for_steps(model)
        self._steps = apart(steps)
        self._new_rows = lambda: (
            on_device_of(self._state, jax.tree.map(jnp.asarray, Draws.none(rows))),
            Slim.of(on_device_of(self._state, steps.init_cache(rows, max_length, **options))),
        )
        self._draws, self._cache = self._new_rows()
        self._whole = whole_on_mesh_of(self._state, self._cache)
        if self._empty.max_length is not None:  # policies that make no room may have less
            self.max_length = min(max_length, self._empty.max_length)
        self._rows: list[Request | None] = [None] * rows
        self._left = [0] * rows  # tokens that each row's request still needs
        self._calls: collections.deque[Call] = collections.deque()  # whose tokens nobody has read
        self._waiting: collections.deque[Request] = collections.deque()
        self._reading: Reading | None = None
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._died: RuntimeError | None = None

    def submit(
        self,
        prompt: Ids,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
        stop_texts: Sequence[str] = (),
        logprobs: int | None = None,
        score_prompt: bool = False,
        on_token: Callable[[int], Any] | None = None,
    ) -> Request:
        """Asks for tokens that continue a prompt; any thread may.

        Args:
          prompt: (t,) ids.
          max_new_tokens: the most new tokens.
          temperature: as for ``generate``, like the next two; 0 takes the most likely token.
          top_k: samples from this many most likely tokens.
          top_p: samples from the most likely tokens that have this probability together.
          seed: of what is drawn, below 2^32: equal requests with equal seeds get equal tokens.
          stop_tokens: ids that end it.
          stop_texts: texts that end it.
          logprobs: gives the log-probability of each new token, and of this many of the most
            likely ones at its place, up to 20.
          score_prompt: gives the same for the prompt's tokens, all of which are then read.
          on_token: is called with each new token, in the thread of the steps.

        Raises:
          ValueError: for arguments out of range, or more tokens than ``max_length``.
          queue.Full: if ``most_waiting`` requests wait.
          RuntimeError: if the thread of the steps has died.
        """
        ids, vocab = as_ids(prompt), self.model.config.vocab_size
        if not len(ids):
            raise ValueError("prompt must have at least one token, got none")
        _checks.check_ids("prompt", int(ids.min()), int(ids.max()), vocab)
        new = _checks.check_integer("max_new_tokens", max_new_tokens)
        if len(ids) + new > self.max_length:
            raise ValueError(
                f"a prompt of {len(ids)} and max_new_tokens={new} are more than the batcher's "
                f"max_length={self.max_length}"
            )
        seed = _checks.check_integer("seed", seed, 0, most=2**32 - 1)
        limits = Limits(stop_tokens, stop_texts)
        limits.check(vocab, self.text_of)
        _checks.check_function("on_token", on_token, "a token id")
        sampling, scoring = Sampling(temperature, top_k, top_p), Scoring(logprobs, score_prompt)
        request = Request(ids, new, sampling, seed, limits, scoring, on_token)
        with self._lock:
            if self._died is not None:
                raise self._died
            if len(self._waiting) >= self.most_waiting:
                raise queue.Full(f"{self.most_waiting} requests wait already")
            self._waiting.append(request)
        self._wake.set()
        return request

    @property
    def is_serving(self) -> bool:
        """Whether its thread takes steps, as it does within the context."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self._died is None and not self._stopping

    @property
    def load(self) -> Load:
        """How many requests it has."""
        with self._lock:
            waiting = len(self._waiting)
        return Load(len(self._rows), len(self._decoding()), int(self._reading is not None), waiting)

    def step(self) -> bool:
        """Reads pieces of prompts, asks for a token of each row, and gives out earlier ones.

        If the device fails, requests in rows end with its error, and the batcher serves the others.

        Returns:
          Whether there was anything to do.
        """
        self._end_cancelled()
        try:
            busy = self._read_or_end()
            # The device computes these tokens while the host gives out those before them.
            later = int(self._decode())
            busy |= bool(self._calls)
            while len(self._calls) > later:
                self._calls[0].give(self.text_of)
                self._calls.popleft()
        except Exception as error:  # of the device: what the rows held may be lost
            self._end_rows(error)
            return True
        return busy

    def run(self) -> None:
        """Takes steps until no request is left."""
        while self.step():
            pass

    def __enter__(self) -> "Batcher":
        self._stopping, self._died = False, None
        self._thread = threading.Thread(target=self._serve_or_end, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Finishes the requests that were submitted, and ends the thread."""
        self._stopping = True
        self._wake.set()
        assert self._thread is not None
        self._thread.join()

    def _serve_or_end(self) -> None:
        """Serves; nobody waits for a thread that has died."""
        try:
            self._serve()
        except BaseException as error:
            cause = RuntimeError(f"the batcher's thread ended: {error!r}")
            with self._lock:
                waiting, self._waiting = self._waiting, collections.deque()
                self._died = cause
            reading, self._reading = self._reading, None
            for request in (*waiting, *([] if reading is None else [reading.request])):
                request.end("error", cause)
            self._end_rows(cause)
            raise

    def _serve(self) -> None:
        while True:
            self._wake.clear()
            stopping = self._stopping  # before the step: what was submitted until then is served
            if not self.step():
                if stopping:
                    return
                self._wake.wait()

    def _read_or_end(self) -> bool:
        """Reads pieces; an error, such as a store that does not fit, ends its prompt's request."""
        left, busy = self.piece, False
        while left > 0 and (reading := self._next_reading()) is not None:
            busy = True
            try:
                reading.begin(self.store)
                size = reading.next_size(self.piece)
                if size > left:
                    break
                left -= max(size, LEAST)
                logits = reading.read_piece(self._graph, self._state, self.piece, self.store)
            except Exception as error:
                reading.request.end("error", error)
                self._reading = None
                continue
            if logits is not None:
                self._begin_row(reading, logits)
        return busy

    def _next_reading(self) -> Reading | None:
        """The prompt being read, or the next one if a row is free."""
        with self._lock:
            if self._reading is None and self._waiting and None in self._rows:
                self._reading = Reading(self._waiting.popleft(), self._empty)
        return self._reading

    def _begin_row(self, read: Reading, logits: Any) -> None:
        """Gives a row and the first token to a request whose prompt has been read."""
        request, row = read.request, self._rows.index(None)
        # A failure of the device ends it with the other rows.
        self._reading, self._rows[row] = None, request
        own, draws = self._placed(Draws.of(request)), self._placed(self._draws)
        tokens, scores, self._draws, self._cache = begin(
            *(logits, np.int32(row), own, read.cache, draws, self._cache),
            config=self.model.config,
        )
        self._calls.append(Call([request], 1, tokens, scores))
        self._left[row] = request.max_new_tokens
        self._count(1, [row])

    def _placed(self, draws: Draws) -> Draws:
        """Laid out alike on a mesh whatever made them: other layouts would compile again."""
        return draws if self._whole is None else jax.device_put(draws, self._whole)

    def _count(self, times: int, rows: list[int]) -> None:
        """Counts tokens that have been asked for; who needs no more leaves the row to others."""
        for row in rows:
            self._left[row] -= times
            if self._left[row] <= 0:
                self._rows[row] = None

    def _decoding(self) -> list[Request]:
        """The requests that have a row, or tokens to come."""
        held = [self._rows, *(call.requests for call in tuple(self._calls))]
        found = dict.fromkeys(request for requests in held for request in requests)
        return [request for request in found if request is not None and not request.is_done]

    def _end_rows(self, error: Exception) -> None:
        """Ends the requests in all rows, and empties them for others: they may be half written."""
        for request in self._decoding():
            request.end("error", error)
        self._rows = [None] * len(self._rows)
        self._calls.clear()
        self._draws, self._cache = self._new_rows()

    def _end_cancelled(self) -> None:
        """Ends what has been cancelled, and frees the rows of all requests that have ended."""
        if self._reading is not None and self._reading.request.is_cancelled:
            self._reading.request.end("cancelled")
            self._reading = None
        with self._lock:
            # Asked once: another thread may cancel one in between.
            marked = [(request, request.is_cancelled) for request in self._waiting]
            self._waiting = collections.deque(request for request, is_gone in marked if not is_gone)
        gone = [request for request, is_gone in marked if is_gone]
        gone += [request for request in self._decoding() if request.is_cancelled]
        for request in gone:
            request.end("cancelled")
        self._rows = [None if r is None or r.is_done else r for r in self._rows]

    def _decode(self) -> bool:
        """Appends each row's last token and draws the next, up to ``ahead`` times in one call."""
        active = np.array([request is not None for request in self._rows])
        if not active.any():
            return False
        with self._lock:
            may_read = self._reading is not None or (self._waiting and None in self._rows)
        rows = np.flatnonzero(active).tolist()
        # A row that ends before the last one draws tokens that are discarded.
        times = 1 if may_read else min(self.ahead, max(self._left[row] for row in rows))
        graph, state = self._steps
        tokens, scores, self._draws, self._cache = decode(
            *(state, active, np.int32(times), self._placed(self._draws), self._cache),
            graph=graph,
            most=self.ahead,
        )
        self._calls.append(Call(list(self._rows), times, tokens, scores))
        self._count(times, rows)
        return True
