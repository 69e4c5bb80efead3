"""Generation token by token, for streamed output and conversations."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._checks import check_instance, check_lengths, check_mapping
from memcache_jax._typing import Array, Int
from memcache_jax.generation.apart import apart
from memcache_jax.generation.generate import extend_in_place
from memcache_jax.generation.prompts import buffer_size, check_prompt, longest
from memcache_jax.generation.sampling import Sampling, sample
from memcache_jax.nn import LanguageModel
from memcache_jax.nn.model_cache import LanguageModelCache


class Decoder:
    """A language model with a cache: feed it tokens, then draw the following ones one by one.

    Fed and drawn tokens form one sequence, so that a conversation never processes its past again.
    After a single prompt the tokens are those of ``generate`` with the same arguments.

    Args:
      model: the model; the decoder does not see later changes of its parameters.
      batch_size: rows.
      max_length: maximum number of tokens of a row; None if ``cache`` bounds the memory.
      temperature: as for ``generate``.
      top_k: as for ``generate``.
      top_p: as for ``generate``.
      key: as for ``generate``.
      cache: options of ``mc.init_cache``: ``max_segments``, ``policy``, ``cache_dtype`` and
        ``placement``.

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
        check_instance("model", model, LanguageModel, "an mc.nn.LanguageModel")
        self._sampling = Sampling(temperature, top_k, top_p)
        self._key = self._sampling.check_key(key)
        self._model = model
        self._graph, self._state = apart(model)
        self._cache = model.init_cache(batch_size, max_length, **check_mapping("cache", cache))
        self._logits: Array | None = None
        self._drawn = 0

    @property
    def cache(self) -> LanguageModelCache:
        """The model's cache. After setting another one, feed tokens before the next draw.

        The next call donates its arrays: keep ``decoder.cache.take(rows)`` to return to it.
        """
        return self._cache

    @cache.setter
    def cache(self, cache: LanguageModelCache) -> None:
        self._cache, self._logits = cache, None

    def feed(
        self, tokens: jax.typing.ArrayLike, lengths: jax.typing.ArrayLike | None = None
    ) -> None:
        """Appends tokens to the sequences.

        Args:
          tokens: (b, t) ids.
          lengths: (b,) number of tokens to take from the start of each row; all by default. A row
            that was fed before may have 0.

        Raises:
          ValueError: for tokens that ``generate`` rejects, or that do not fit the cache, which
            then stays unchanged.
        """
        tokens = check_prompt(tokens, self._model)
        least = 1 if self._logits is None else 0
        self._extend(tokens, jnp.asarray(check_lengths(lengths, tokens.shape, least), jnp.int32))

    def next(self) -> Int[np.ndarray, "b"]:
        """Draws the next token of each row, and appends it.

        Raises:
          ValueError: before the first ``feed``, or if the cache is full.
        """
        if self._logits is None:
            raise ValueError("feed at least one token before drawing the next one")
        key = jax.random.fold_in(self._key, self._drawn)  # as in generate
        self._drawn += 1
        token = _draw(key, self._logits, self._sampling.numbers, **self._sampling.static)
        self._extend(token[:, None], None)
        return np.asarray(token)

    def _extend(self, tokens: Array, lengths: Array | None) -> None:
        self._cache.check_room(tokens.shape, lengths)
        if lengths is not None:
            padding = buffer_size(tokens.shape[1], longest(self._model)) - tokens.shape[1]
            tokens = jnp.pad(tokens, ((0, 0), (0, padding)))
        args = self._state, tokens, lengths, self._cache
        self._cache, logits = extend_in_place(*args, graph=self._graph)
        if lengths is not None and self._logits is not None:
            logits = jnp.where((lengths > 0)[:, None], logits, self._logits)
        self._logits = logits


_draw = jax.jit(sample, static_argnames=("greedy", "top_k", "nucleus"))
