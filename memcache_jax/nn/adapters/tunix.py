"""A language model as Tunix's trainers and samplers call it."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.adapters._cache import HostCache, empty, extend
from memcache_jax.nn.language_model import LanguageModel
from memcache_jax.nn.unrolled import Unrolled


class TunixModel(nnx.Module):
    """A ``LanguageModel`` with the call of Tunix's models, for its trainers, samplers and LoRA.

    Padding on the left of a row, as Tunix's prompts have it, is moved to the right before the model
    sees it: outputs do not depend on it. The parameters are those of the model, which is not
    changed; ``language_model()`` gives them back.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=2, features=64, num_heads=4)
      >>> model = mc.nn.adapters.TunixModel(mc.nn.LanguageModel(config, rngs=nnx.Rngs(0)))
      >>> mask = jnp.tril(jnp.ones((1, 9, 9), bool))
      >>> model(jnp.ones((1, 9), int), jnp.arange(9)[None], None, mask)[0].shape
      (1, 9, 257)
    """

    def __init__(self, model: LanguageModel) -> None:
        self.config, self.num_embed = model.config, model.config.vocab_size
        self.model = Unrolled(model)

    def language_model(self) -> LanguageModel:
        """Returns the parameters as a ``LanguageModel``, for ``mc.generate`` and checkpoints."""
        return self.model.language_model()

    def init_cache(self, batch_size: int, cache_size: int, dtype: Any) -> HostCache:
        """Returns an empty cache for ``cache_size`` tokens a row, whose states are of ``dtype``."""
        return empty(self.model.init_cache(batch_size, cache_size, cache_dtype=dtype), batch_size)

    def get_model_input(self) -> dict:
        """Arguments of a call, with which Tunix's command line applies LoRA."""
        one, mask = jnp.ones((2, 1), jnp.int32), jnp.ones((2, 1, 1), bool)
        return dict(input_tokens=one, positions=one, cache=None, attention_mask=mask)

    def __call__(
        self,
        input_tokens: Int[Array, "b t"],
        positions: Array | None = None,
        cache: Any = None,
        attention_mask: Array | None = None,
        segment_ids: Array | None = None,
        decode_only_last_token: bool = False,
    ) -> tuple[Float[Array, "b _ vocab"], HostCache | None]:
        """Returns the logits, of the last tokens alone if asked, and the cache, None without one.

        The mask tells the documents and the padding. Without one, the segments are the documents;
        without both, a document begins where a position does not follow the one before.

        Raises:
          ValueError: for a mask that memories cannot follow, see ``ModelCall``; where it is traced,
            tokens or rows of it give NaN.
        """
        if cache is not None:
            hidden, cache = extend(self.model, input_tokens, cache, attention_mask)
        elif attention_mask is not None:
            hidden = self.model(input_tokens, mask=attention_mask)
        elif segment_ids is not None:
            hidden = self.model(input_tokens, segment_ids=segment_ids)
        else:
            hidden = self.model(input_tokens, positions=positions)
        return self.model.outer.logits(hidden[:, -1:] if decode_only_last_token else hidden), cache
