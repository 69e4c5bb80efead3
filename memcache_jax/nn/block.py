"""The residual block, and the period of blocks that a language model repeats."""

from typing import Any

from flax import nnx

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.config import BlockConfig, LanguageModelConfig
from memcache_jax.sharding.layout import like
from memcache_jax.sharding.names import constrain


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), as a ``BlockConfig`` has it."""

    def __init__(self, config: LanguageModelConfig, block: BlockConfig, *, rngs: nnx.Rngs) -> None:
        options: dict[str, Any] = dict(
            dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
        )
        self.config = block
        self.mixer_norm = block.norm.build(config.features, **options)
        self.mixer = block.mixer.build(
            config.features, config.num_heads, head_dim=config.head_dim, **options
        )
        if block.mlp is not None:
            self.mlp_norm = block.norm.build(config.features, **options)
            self.mlp = block.mlp.build(config.features, **options)

    def __call__(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Applies the mixer and the MLP."""
        documents = () if document_ids is None else (document_ids,)
        mixer: Any = self.mixer
        y = mixer(self.mixer_input(x), *documents)
        mixed = _laid(x + self._residual(y, self.mixer_norm), x)
        return _laid(self._mix_features(mixed), x)

    def mixer_input(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What the mixer is given, of the block's input."""
        return x if self.config.norm_last else self.mixer_norm(x)

    def _residual(self, y: Float[Array, "b t d"], norm: Any) -> Float[Array, "b t d"]:
        y = norm(y) if self.config.norm_last else y
        return y if self.config.residual_scale == 1 else self.config.residual_scale * y

    def extend(
        self, x: Float[Array, "b t d"], cache: Any, lengths: Int[Array, "b"] | None
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Applies both to the next tokens of a stream; returns the mixer's next cache too."""
        mixer: Any = self.mixer
        y, cache = mixer.extend(self.mixer_input(x), cache, lengths)
        y = like(x, x + self._residual(y, self.mixer_norm))
        return like(x, self._mix_features(y)), cache

    def _mix_features(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        if self.config.mlp is None:
            return x
        mlp: Any = self.mlp
        y = mlp(x if self.config.norm_last else self.mlp_norm(x))
        return x + self._residual(y, self.mlp_norm)


def _laid(y: Float[Array, "b t d"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The output of a block, which lies as its input."""
    return like(x, constrain(y, "batch", "time", None))


class Period(nnx.Module):
    """A sequence of blocks; the model repeats this."""

    def __init__(
        self, config: LanguageModelConfig, blocks: tuple[BlockConfig, ...], *, rngs: nnx.Rngs
    ) -> None:
        self.blocks = nnx.List([Block(config, block, rngs=rngs) for block in blocks])
        if config.lora is not None:
            config.lora.attach(self, rngs=rngs)

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
