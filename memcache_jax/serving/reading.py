"""Reading a prompt piece by piece, into a cache of its own."""

from typing import Any

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float
from memcache_jax.generation.apart import Frame
from memcache_jax.nn.model_cache import LanguageModelCache
from memcache_jax.serving.prefix_store import PrefixStore
from memcache_jax.serving.request import Request
from memcache_jax.serving.scores import read

LEAST = 16
"""The tokens that a shorter piece counts as, since it takes about as long to read."""


class Reading:
    """A request's prompt, and the cache after the tokens read so far.

    Attributes:
      request: the request.
      cache: the cache after these tokens; None before the first piece.
      taken: how many tokens have been read.
    """

    def __init__(self, request: Request, empty: LanguageModelCache) -> None:
        self.request, self.taken = request, 0
        self.cache, self._empty = None, empty

    def begin(self, store: PrefixStore | None) -> None:
        """Looks up the store's longest prefix of the prompt; has no effect once begun."""
        if self.cache is not None:
            return
        if store is not None and not self.request.scoring.prompt:
            self.cache, self.taken = store.match(self.request.prompt)
        if self.cache is None:
            self.cache = _copied(self._empty)
        self.request.known = self.taken

    def next_size(self, piece: int) -> int:
        """The size of the next piece, which depends only on the prompt and its known prefix.

        The largest power of two that does not cross a multiple of ``piece``, so that prompts with
        the same beginning are cut alike, whether or not the store has a part of them.
        """
        left = len(self.request.prompt) - self.taken
        return 1 << (min(left, piece - self.taken % piece).bit_length() - 1)

    def read_piece(
        self, graph: Frame, state: Any, piece: int, store: PrefixStore | None
    ) -> Float[Array, "1 vocab"] | None:
        """Reads the next piece; returns logits after the prompt's last one."""
        prompt, scored = self.request.prompt, self.request.scoring.prompt
        left, size = len(prompt) - self.taken, self.next_size(piece)
        begin, self.taken = self.taken, self.taken + size
        args = prompt, begin, self.taken, self.cache
        self.cache, logits, scores = read(state, *args, graph=graph, scored=scored)
        if scores is not None:
            count = self.request.scoring.likely or 0
            places = min(self.taken, len(prompt) - 1) - begin  # the last token has none after it
            self.request.prompt_logprobs += [scores.of(i, count) for i in range(places)]
        if store is not None and (self.taken % piece == 0 or size == left):
            store.insert(prompt[: self.taken], self.cache)
        return logits if size == left else None


@jax.jit
def _copied(cache: LanguageModelCache) -> LanguageModelCache:
    """A copy that can be donated, made by one program."""
    return jax.tree.map(jnp.copy, cache)
