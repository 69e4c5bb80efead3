"""A language model as Tunix's trainers and samplers call it."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.adapters._layers import Unrolled
from memcache_jax.nn.adapters._masks import Rows, checked, read_mask, read_next, shift
from memcache_jax.nn.language_model import LanguageModel


class TunixCache(NamedTuple):
    """A stream's past: a cache per layer, and each row's tokens so far."""

    past: list
    position: Int[Array, "b"]  # without padding
    end_index: Int[Array, "b"]  # with padding, the same for all rows


class TunixModel(nnx.Module):
    """A ``LanguageModel`` with the call of Tunix's models, for its trainers, samplers and LoRA.

    Padding on the left of a row, as Tunix's prompts have it, is moved to the right before the model
    sees it: outputs do not depend on it. The parameters are those of the model, which is not
    changed; ``model.language_model()`` gives them back.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=2, features=64, num_heads=4)
      >>> model = mc.nn.adapters.TunixModel(mc.nn.LanguageModel(config, rngs=nnx.Rngs(0)))
      >>> mask = jnp.tril(jnp.ones((1, 9, 9), bool))
      >>> logits, cache = model(jnp.ones((1, 9), int), jnp.arange(9)[None], None, mask)
      >>> logits.shape
      (1, 9, 257)
    """

    def __init__(self, model: LanguageModel) -> None:
        self.config, self.num_embed = model.config, model.config.vocab_size
        self.model = Unrolled(model)

    def language_model(self) -> LanguageModel:
        """Returns the parameters as a ``LanguageModel``, for ``mc.generate`` and checkpoints."""
        return self.model.language_model()

    def init_cache(self, batch_size: int, cache_size: int, dtype: DTypeLike) -> TunixCache:
        """Returns an empty cache for ``cache_size`` tokens a row, whose states are of ``dtype``."""
        past = self.model.init_cache(batch_size, cache_size, dict(cache_dtype=dtype))
        # Two arrays, since the sampler donates them.
        return TunixCache(past, *(jnp.zeros(batch_size, jnp.int32) for _ in range(2)))

    def get_model_input(self) -> dict:
        """Arguments of a call, with which Tunix's command line applies LoRA."""
        one = jnp.ones((2, 1), jnp.int32)
        mask = jnp.ones((2, 1, 1), bool)
        return dict(input_tokens=one, positions=one, cache=None, attention_mask=mask)

    def __call__(
        self,
        input_tokens: Int[Array, "b t"],
        positions: Array | None = None,
        cache: TunixCache | None = None,
        attention_mask: Array | None = None,
        segment_ids: Array | None = None,
        decode_only_last_token: bool = False,
    ) -> tuple[Float[Array, "b t vocab"], TunixCache | None]:
        """Returns the logits, of the last tokens alone if asked, and the cache, None without one.

        The mask tells the documents and the padding. Without one, the segments are the documents;
        without both, a document begins where a position does not follow the one before.

        Raises:
          ValueError: for a mask that a memory does not honour, see ``docs/hosts.md``; under a trace
            its tokens give NaN.
        """
        if cache is None:
            rows = _rows(input_tokens, positions, attention_mask, segment_ids)
            padding, honoured = jnp.argmax(rows.real, axis=1), rows.honoured
            hidden = self.model.hidden(shift(input_tokens, padding), shift(rows.first, padding))
        else:
            past, position, end = cache
            padding, lengths, honoured = read_next(attention_mask, end[0], position)
            hidden, past = self.model.extend(shift(input_tokens, padding), past, lengths)
            cache = TunixCache(past, position + lengths, end + input_tokens.shape[1])
        hidden = checked(honoured, shift(hidden, -padding))
        return self.model.outer.logits(hidden[:, -1:] if decode_only_last_token else hidden), cache


def _rows(
    tokens: Array, positions: Array | None, mask: Array | None, segment_ids: Array | None
) -> Rows:
    if mask is not None:
        return read_mask(mask)
    every, first = jnp.ones(tokens.shape, bool), segment_ids
    if first is None and positions is not None:
        first = jnp.cumsum(positions != jnp.pad(positions, ((0, 0), (1, 0)))[:, :-1] + 1, axis=1)
    return Rows(every, jnp.zeros_like(tokens) if first is None else first, every)
