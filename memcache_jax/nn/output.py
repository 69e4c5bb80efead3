"""What a language model does with the output of its last block."""

from typing import Any

import jax.numpy as jnp

from memcache_jax._checks import check_array
from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.config import LanguageModelConfig
from memcache_jax.nn.layers import Embed, Linear, is_adapted
from memcache_jax.nn.loss import CrossEntropy, TokenScores, cross_entropy, token_scores


class Output:
    """The output layer of a ``LanguageModel``: logits, or losses that need none of them."""

    config: LanguageModelConfig
    embedding: Embed
    head: Linear

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
        """Returns the output layer's logits, in float32 or wider."""
        shape, _ = check_array("hidden", hidden)
        if shape[-1:] != (self.config.features,):
            raise ValueError(
                f"hidden must be (..., d) with d = features = {self.config.features}, got {shape}"
            )
        logits = self.embedding.attend(hidden) if self.config.tie_embeddings else self.head(hidden)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return logits if self.config.logit_scale == 1 else self.config.logit_scale * logits

    def cross_entropy(
        self,
        hidden: Float[Array, "b t d"],
        targets: Int[Array, "b t"],
        weights: Float[Array, "b t"] | None = None,
        *,
        z_loss: float = 0.0,
    ) -> CrossEntropy:
        """Returns ``mc.nn.cross_entropy`` of the output layer, which never holds all logits.

        Args:
          hidden: from the method of that name.
          targets: the token that follows each position.
          weights: of the targets; 1 by default, 0 for those that do not count.
          z_loss: weight of the z-loss.

        Raises:
          ValueError: for arrays whose shapes or dtypes do not fit.
        """
        options = dict(z_loss=z_loss, scale=self.config.logit_scale)
        return cross_entropy(hidden, self._matrix, targets, weights, **options)

    def token_scores(
        self, hidden: Float[Array, "b t d"], targets: Int[Array, "b t"]
    ) -> TokenScores:
        """Returns ``mc.nn.token_scores`` of the output layer, which never holds all logits.

        Args:
          hidden: from the method of that name.
          targets: the token that follows each position.

        Raises:
          ValueError: for arrays whose shapes or dtypes do not fit.
        """
        return token_scores(hidden, self._matrix, targets, scale=self.config.logit_scale)

    @property
    def _matrix(self) -> Any:
        if self.config.tie_embeddings:
            return self.embedding.embedding[...].T
        if is_adapted(self.head):
            return self.head(jnp.eye(self.config.features, dtype=self.config.dtype))
        return self.head.kernel[...]
