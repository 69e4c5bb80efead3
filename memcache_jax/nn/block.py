"""The residual block, and the period of blocks that a language model repeats."""

from typing import Any

from flax import nnx

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.config import LanguageModelConfig, Mixer
from memcache_jax.nn.layers import SwiGLU
from memcache_jax.sharding.layout import like
from memcache_jax.sharding.names import constrain


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LanguageModelConfig, mixer: Mixer, *, rngs: nnx.Rngs) -> None:
        options = dict(dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        self.mixer_norm = nnx.RMSNorm(config.features, **options)
        self.mixer = mixer.build(
            config.features, config.num_heads, head_dim=config.head_dim, **options
        )
        hidden = config.mlp_features
        if hidden is None:
            hidden = -(-8 * config.features // (3 * 64)) * 64
        self.has_mlp = hidden > 0
        if self.has_mlp:
            self.mlp_norm = nnx.RMSNorm(config.features, **options)
            self.mlp = SwiGLU(config.features, hidden, **options)

    def __call__(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Applies the mixer and the MLP."""
        documents = () if document_ids is None else (document_ids,)
        mixed = _laid(x + self.mixer(self.mixer_norm(x), *documents), x)
        return _laid(self._mix_features(mixed), x)

    def extend(
        self, x: Float[Array, "b t d"], cache: Any, lengths: Int[Array, "b"] | None
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Applies both to the next tokens of a stream; returns the mixer's next cache too."""
        mixer: Any = self.mixer
        y, cache = mixer.extend(self.mixer_norm(x), cache, lengths)
        return like(x, self._mix_features(like(x, x + y))), cache

    def _mix_features(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return x + self.mlp(self.mlp_norm(x)) if self.has_mlp else x


def _laid(y: Float[Array, "b t d"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The output of a block, which lies as its input."""
    return like(x, constrain(y, "batch", "time", None))


class Period(nnx.Module):
    """One block per mixer; the model repeats this."""

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(config, mixer, rngs=rngs) for mixer in config.mixers])

    def __call__(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None
    ) -> Float[Array, "b t d"]:
        """Applies the blocks in turn."""
        for block in self.blocks:
            x = block(x, document_ids)
        return x

    def init_cache(self, batch_size: int, max_length: int | None, options: dict) -> list:
        """Returns an empty cache per block."""
        mixers: list[Any] = [block.mixer for block in self.blocks]
        return [mixer.init_cache(batch_size, max_length, **options) for mixer in mixers]

    def extend(self, x: Array, caches: list, lengths: Array | None) -> tuple[Array, list]:
        """Applies the blocks to the next tokens of a stream; returns their next caches too."""
        new = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.extend(x, cache, lengths)
            new.append(cache)
        return x, new
