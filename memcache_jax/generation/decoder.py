"""Generation token by token, for streamed output and conversations."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._checks import check_instance, check_lengths, check_mapping, check_room
from memcache_jax._typing import Array, Float, Int
from memcache_jax.generation.apart import Frame, apart
from memcache_jax.generation.generate import extend_in_place, extend_logits
from memcache_jax.generation.prompts import buffer_size, check_prompt, longest
from memcache_jax.generation.sampling import Sampling, sample
from memcache_jax.nn import LanguageModel, LanguageModelConfig
from memcache_jax.nn.model_cache import LanguageModelCache
from memcache_jax.nn.unrolled import for_steps, stacked_cache, unrolled_cache
from memcache_jax.streaming.loops import Slim


class Decoder:
    """A language model with a cache: feed it tokens, then draw the following ones one by one.

    Fed and drawn tokens form one sequence, so that a conversation never processes its past again.
    After a single prompt the tokens are those of ``generate`` with the same arguments. For a model
    of a few large layers, the decoder holds a second copy of the parameters, unstacked, with which
    it draws tokens faster.

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
        options = check_mapping("cache", cache)
        self.cache = model.init_cache(batch_size, max_length, **options)
        steps: Any = model if "sharding" in options else for_steps(model)
        self._steps = apart(steps)
        self._unrolled = None if steps is model else model.config
        self._drawn = 0

    @property
    def cache(self) -> LanguageModelCache:
        """The model's cache. After setting another one, feed tokens before the next draw.

        The next call donates its arrays: keep ``decoder.cache.take(rows)`` to return to it.
        """
        if self._stepping is not None:
            how: Any = dict(config=self._unrolled, max_length=self._max_length)
            self._cache, self._stepping = _put_together(self._stepping, **how), None
        return self._cache

    @cache.setter
    def cache(self, cache: LanguageModelCache) -> None:
        self._max_length = cache.max_length
        self._cache: Any = cache
        self._position: np.ndarray | None = None  # on the host, once it is needed
        self._stepping: Slim | None = None  # the cache while tokens are drawn
        self._logits: Array | None = None

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
        lengths = check_lengths(lengths, tokens.shape, least)
        position = self._check_room(tokens.shape, lengths)
        padding = buffer_size(tokens.shape[1], longest(self._model)) - tokens.shape[1]
        tokens, counts = np.pad(tokens, ((0, 0), (0, padding))), jnp.asarray(lengths, jnp.int32)
        args = self._state, tokens, counts, self.cache
        self._cache, logits = extend_in_place(*args, graph=self._graph)
        if self._logits is not None:
            logits = jnp.where((counts > 0)[:, None], logits, self._logits)
        self._logits = logits
        self._position = position + np.asarray(lengths)

    def next(self) -> Int[np.ndarray, "b"]:
        """Draws the next token of each row, and appends it.

        Raises:
          ValueError: before the first ``feed``, or if the cache is full.
        """
        if self._logits is None:
            raise ValueError("feed at least one token before drawing the next one")
        position = self._check_room((len(self._logits), 1), None)
        graph, state = self._steps
        if self._stepping is None:
            self._stepping, self._cache = _taken_apart(self._cache, config=self._unrolled), None
        token, self._stepping, self._logits = _next(
            *(state, self._key, np.int32(self._drawn), self._logits, self._sampling.numbers),
            self._stepping,
            graph=graph,
            **self._sampling.static,
        )
        self._drawn, self._position = self._drawn + 1, position + 1
        return np.asarray(token)

    def _check_room(self, shape: tuple[int, ...], lengths: Any) -> np.ndarray:
        """Returns the tokens that each row holds, if there is room for these."""
        if self._position is None:
            self._position = np.asarray(self.cache.position)
        check_room(self._position, shape, lengths, self._max_length)
        return self._position


@functools.partial(
    jax.jit,
    static_argnames=("graph", "greedy", "top_k", "nucleus"),
    donate_argnames=("cache", "logits"),
)
def _next(
    state: Any,
    key: Array,
    drawn: Int[Array, ""],
    logits: Float[Array, "b v"],
    numbers: tuple[Any, Any],
    cache: Slim,
    *,
    graph: Frame,
    **sampling: Any,
) -> tuple[Int[Array, "b"], Slim, Float[Array, "b v"]]:
    """The next tokens, the cache after them, and the logits of the tokens after those."""
    token = sample(jax.random.fold_in(key, drawn), logits, numbers, **sampling)  # as in generate
    cache, logits = extend_logits(graph.merge(state), token[:, None], cache.full())
    return token, Slim.of(cache), logits


@functools.partial(jax.jit, static_argnames="config")
def _taken_apart(cache: LanguageModelCache, *, config: LanguageModelConfig | None) -> Slim:
    """A cache as ``_next`` takes it: unstacked if there is a ``config``."""
    return Slim.of(cache if config is None else unrolled_cache(config, cache))


@functools.partial(jax.jit, static_argnames=("config", "max_length"))
def _put_together(
    cache: Slim, *, config: LanguageModelConfig | None, max_length: int | None
) -> LanguageModelCache:
    """The inverse of ``_taken_apart``."""
    full = cache.full()
    return full if config is None else stacked_cache(config, full, max_length)
