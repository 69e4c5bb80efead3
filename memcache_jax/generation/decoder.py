"""Generation token by token, for output as it comes and for conversations."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memcache_jax._checks import check_lengths
from memcache_jax._typing import Array, Int
from memcache_jax.generation.generate import extend_logits
from memcache_jax.generation.prompts import buffer_size, check_prompt
from memcache_jax.generation.sampling import Sampling, sample
from memcache_jax.nn import LanguageModel
from memcache_jax.nn.model_cache import LanguageModelCache


class Decoder:
    """A language model that keeps its cache: feed it tokens, and take what follows one by one.

    What is fed and what is drawn is one sequence, so that a conversation never passes over its past
    again. After one prompt and with equal arguments the tokens are those of ``generate``.

    Args:
      model: the model; later changes of its parameters are not seen.
      batch_size: rows.
      max_length: tokens that a row may take; None where ``cache`` bounds the memory instead.
      temperature: as for ``generate``, and so are the next three.
      top_k: of this many tokens.
      top_p: of the most likely ones that have this probability together.
      key: a random key; not needed for temperature 0.
      cache: how states are kept: ``max_segments``, ``policy``, ``cache_dtype`` and ``placement`` of
        ``mc.init_cache``.

    Raises:
      ValueError: as ``generate``.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=1, features=32, num_heads=2)
      >>> decoder = mc.Decoder(mc.nn.LanguageModel(config, rngs=nnx.Rngs(0)), max_length=100,
      ...                      temperature=0)
      >>> decoder.feed(jnp.array([[72, 105]]))
      >>> [decoder.next().shape for _ in range(2)]
      [(1,), (1,)]
      >>> decoder.feed(jnp.array([[33]]))
      >>> decoder.cache.position.tolist()
      [5]
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int = 1,
        *,
        max_length: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        key: Array | None = None,
        cache: Mapping[str, Any] | None = None,
    ) -> None:
        self._sampling = Sampling(temperature, top_k, top_p)
        self._key = self._sampling.check_key(key)
        self._model = model
        self._graph, self._state = nnx.split(model)
        self._cache = model.init_cache(batch_size, max_length, **(cache or {}))
        self._logits: Array | None = None
        self._drawn = 0

    @property
    def cache(self) -> LanguageModelCache:
        """The model's cache. Another may be put in its place, and tokens are fed before the next.

        The next call takes its arrays: keep ``decoder.cache.take(rows)`` to come back to it.
        """
        return self._cache

    @cache.setter
    def cache(self, cache: LanguageModelCache) -> None:
        self._cache, self._logits = cache, None

    def feed(
        self, tokens: jax.typing.ArrayLike, lengths: jax.typing.ArrayLike | None = None
    ) -> None:
        """Takes tokens of the caller's.

        Args:
          tokens: (b, t) ids.
          lengths: (b,) tokens of each row that count, the first ones; all by default. A row that
            was fed before may have none.

        Raises:
          ValueError: for tokens as ``generate`` refuses them, or that find no room in the cache,
            which is then as it was before.
        """
        tokens = check_prompt(tokens, self._model)
        least = 1 if self._logits is None else 0
        self._extend(tokens, jnp.asarray(check_lengths(lengths, tokens.shape, least), jnp.int32))

    def next(self) -> Int[np.ndarray, "b"]:
        """Draws the next token of each row, and takes it.

        Raises:
          ValueError: before any token was fed, or where the cache is full.
        """
        if self._logits is None:
            raise ValueError("feed at least one token before the first one is drawn")
        key = jax.random.fold_in(self._key, self._drawn)  # as generate's
        self._drawn += 1
        token = _draw(key, self._logits, self._sampling.numbers, **self._sampling.static)
        self._extend(token[:, None], None)
        return np.asarray(token)

    def _extend(self, tokens: Array, lengths: Array | None) -> None:
        self._cache.check_room(tokens.shape, lengths)
        if lengths is not None:
            padding = buffer_size(tokens.shape[1]) - tokens.shape[1]
            tokens = jnp.pad(tokens, ((0, 0), (0, padding)))
        self._cache, logits = _extend(self._state, tokens, lengths, self._cache, graph=self._graph)
        if lengths is not None and self._logits is not None:
            logits = jnp.where((lengths > 0)[:, None], logits, self._logits)
        self._logits = logits


_draw = jax.jit(sample, static_argnames=("greedy", "top_k", "nucleus"))


@functools.partial(jax.jit, static_argnames="graph", donate_argnums=3)
def _extend(
    state: Any,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"] | None,
    cache: LanguageModelCache,
    *,
    graph: Any,
) -> tuple[LanguageModelCache, Array]:
    return extend_logits(nnx.merge(graph, state), tokens, cache, lengths)
