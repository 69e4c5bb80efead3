"""The residual block, and the period of blocks that a language model repeats."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.engine.types import CachedStates
from memcache_jax.nn.config import BlockConfig, LanguageModelConfig
from memcache_jax.nn.groups import call_in_group, extend_in_group, leaders
from memcache_jax.nn.layer_cache import LayerCache
from memcache_jax.nn.recurrent import Recurrent
from memcache_jax.sharding.layout import like
from memcache_jax.sharding.names import constrain
from memcache_jax.streaming.borders import num_ends
from memcache_jax.streaming.protocol import MixerCache
from memcache_jax.streaming.ring import Ring
from memcache_jax.streaming.tails import earlier_tails, next_tails, tails_at, tails_at_ends


class Hidden(NamedTuple):
    """What goes from block to block where layers mix in the values of the first.

    Attributes:
      x: the residual stream.
      values: those of the first layer, zero before it.
    """

    x: Float[Array, "b t d"]
    values: Float[Array, "b t hv"]


Between: TypeAlias = Float[Array, "b t d"] | Hidden
"""What goes from block to block."""


def stream_of(between: Between) -> Float[Array, "b t d"]:
    """The residual stream."""
    return between.x if isinstance(between, Hidden) else between


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache(MixerCache):
    """A stream's past in a block whose MLP sees the token before.

    Attributes:
      mixer: the cache of the mixer.
      tail: the MLP's last input of each row, (b, 1, d).
      past: a ring of those before each of the last tokens; None where rows cannot go back.
      first: this block's number in a stack of blocks, which share ``past``.
      ends: a ring of tails at the ends of the mixer's segments, with ``keep_ends``; else None.
      rewind_most: by how many tokens a row can go back.
    """

    mixer: Any
    tail: Any
    past: Any = None
    first: Any = None
    ends: Any = None
    rewind_most: int = dataclasses.field(default=0, metadata=dict(static=True))

    nested = ("mixer",)
    small = zeroed = ("tail",)
    shared = ("past", "ends")
    axes: ClassVar = {"tail": "b"}

    @property
    def position(self) -> Any:
        """Tokens taken so far by each row, (b,), of a mixer whose cache tells."""
        return getattr(self.mixer, "position", None)

    @property
    def rewindable(self) -> Array | None:
        """By how many tokens each row can go back, (b,); None where none can."""
        return getattr(self.mixer, "rewindable", None)

    def rewound(self, tokens: Int[Array, "b"]) -> "BlockCache":
        """As ``MixerCache.rewound``."""
        mixer = self.mixer.rewound(tokens)
        places = self.rewind_most, self.position, mixer.position
        tail = earlier_tails(self.tail, self.past, *places, self.first)
        return self.replace(mixer=mixer, tail=tail)

    def borders(self, length: int) -> np.ndarray:
        """As ``MixerCache.borders``."""
        found = self.mixer.borders(length)
        if self.ends is None:
            raise ValueError(
                "cannot return to a segment's begin without the last input of an MLP there: make "
                "the cache with init_cache(..., keep_ends=True), or use a PrefixStore"
            )
        return found

    def returned(
        self, position: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple["BlockCache", Bool[Array, "b"]]:
        """As ``MixerCache.returned``."""
        mixer, whole = self.mixer.returned(position, rows)
        config = mixer.memory.config
        tail = tails_at(self.tail, self.ends, config, position, rows, self.first)
        return self.replace(mixer=mixer, tail=tail), whole

    @property
    def max_length(self) -> int | None:
        """Most tokens per row; None for any number."""
        return getattr(self.mixer, "max_length", None)


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), as a ``BlockConfig`` has it."""

    def __init__(self, config: LanguageModelConfig, block: BlockConfig, *, rngs: nnx.Rngs) -> None:
        options: dict[str, Any] = dict(
            dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
        )
        self.config = block
        self.in_group = False  # whether its mixer shares cached states with others
        self.is_followed = False  # whether others also read what it chooses
        self.mixer_norm = block.norm.build(config.features, **options)
        self.mixer = block.mixer.build(
            config.features, config.num_heads, head_dim=config.head_dim, **options
        )
        if block.mlp is not None:
            self.mlp_norm = block.norm.build(config.features, **options)
            self.mlp = block.mlp.build(config.features, **options)

    def __call__(self, between: Between, document_ids: Int[Array, "b t"] | None = None) -> Between:
        """Applies the mixer and the MLP."""
        return self.in_period(between, document_ids)[0]

    def in_period(
        self,
        between: Between,
        document_ids: Int[Array, "b t"] | None = None,
        states: CachedStates | None = None,
    ) -> tuple[Between, CachedStates | None]:
        """As a call; also takes and returns the cached states that layers of a group share."""
        documents = () if document_ids is None else (document_ids,)
        mixer: Any = self.mixer
        x = stream_of(between)
        given: Any = self.mixer_input(x)
        if isinstance(between, Hidden) and isinstance(mixer, Recurrent):
            y, values = mixer.call_in_model(given, document_ids, between.values)
            between = between._replace(values=values)
        elif self.in_group:
            y, states = call_in_group(mixer, given, document_ids, states)
        else:
            y = mixer(given, *documents)
        x = _laid(x + self._residual(y, self.mixer_norm), x)
        if self.config.mlp is not None:
            mlp: Any = self.mlp
            shifted = documents if self._mlp_shifts else ()
            y = mlp(self._input(x, self.mlp_norm), *shifted)
            x = _laid(x + self._residual(y, self.mlp_norm), x)
        return _with_stream(between, x), states

    def mixer_input(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What the mixer is given, of the block's input."""
        return self._input(x, self.mixer_norm)

    def _input(self, x: Float[Array, "b t d"], norm: Any) -> Float[Array, "b t d"]:
        return x if self.config.norm_last else norm(x)

    def _residual(self, y: Float[Array, "b t d"], norm: Any) -> Float[Array, "b t d"]:
        y = norm(y) if self.config.norm_last else y
        return y if self.config.residual_scale == 1 else self.config.residual_scale * y

    @property
    def _mlp_shifts(self) -> bool:
        """Whether the MLP sees the token before."""
        return getattr(self.config.mlp, "shifts", False)

    def init_cache(self, batch_size: int, max_length: int | None, options: dict) -> Any:
        """Returns an empty cache."""
        mixer: Any = self.mixer
        cache = mixer.init_cache(batch_size, max_length, **options)
        if not self._mlp_shifts:
            return cache
        mlp: Any = self.mlp
        tail, most = mlp.init_tail(batch_size), options.get("rewind", 0)
        past = Ring(most, tail).empty(batch_size) if most else None
        ends = None
        if options.get("keep_ends"):
            _checks.check_instance("the mixer's cache", cache, LayerCache, "one with segments")
            ends = Ring(num_ends(cache.memory.config), tail).empty(batch_size)
        return BlockCache(cache, tail, past, ends=ends, rewind_most=most)

    def extend(
        self, between: Between, cache: Any, lengths: Int[Array, "b"] | None, source: Any = None
    ) -> tuple[Between, Any, Any]:
        """Applies both to the next tokens of a stream; returns the next cache too, and a choice.

        ``source`` is the cache of the block whose states the mixer reads, and what it chose; None
        if it has its own.
        """
        mixer: Any = self.mixer
        x, chosen = stream_of(between), None
        of_mixer = cache.mixer if self._mlp_shifts else cache
        given: Any = self.mixer_input(x)
        if isinstance(between, Hidden) and isinstance(mixer, Recurrent):
            args = given, of_mixer, lengths, between.values
            y, of_mixer, values = mixer.extend_in_model(*args)
            between = between._replace(values=like(between.values, values))
        elif self.in_group:
            if source is not None:
                of_source = source[0].mixer if isinstance(source[0], BlockCache) else source[0]
                source = of_source.memory, source[1]
            args = mixer, given, of_mixer, lengths, source, self.is_followed
            y, of_mixer, chosen = extend_in_group(*args)
        else:
            y, of_mixer = mixer.extend(given, of_mixer, lengths)
        x = like(x, x + self._residual(y, self.mixer_norm))
        if self.config.mlp is None:
            return _with_stream(between, x), of_mixer, chosen
        mlp: Any = self.mlp
        if not self._mlp_shifts:
            y, cache = mlp(self._input(x, self.mlp_norm)), of_mixer
        else:
            rows = self._input(x, self.mlp_norm)
            counts = jnp.full(len(x), x.shape[1]) if lengths is None else jnp.asarray(lengths)
            places = cache.tail, cache.position, counts
            where: dict[str, Any] = dict(most=x.shape[1], first=cache.first, axes="b . .")

            def next_rows(counts: Array) -> tuple[Array, Any]:
                return mlp.extend(rows, cache.tail, counts)

            (y, tail), past = next_tails(next_rows, cache.past, cache.rewind_most, *places, **where)
            ends = None
            if cache.ends is not None:
                config = of_mixer.memory.config
                every = num_ends(config), config.segmentation.size
                ends = tails_at_ends(next_rows, cache.ends, *every, *places, **where)
            cache = cache.replace(mixer=of_mixer, tail=tail, past=past, ends=ends)
        x = like(x, x + self._residual(y, self.mlp_norm))
        return _with_stream(between, x), cache, chosen


def _with_stream(between: Between, x: Float[Array, "b t d"]) -> Between:
    return between._replace(x=x) if isinstance(between, Hidden) else x


def _laid(y: Float[Array, "b t d"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The output of a block, which lies as its input."""
    return like(x, constrain(y, "batch", "time", None))


class Period(nnx.Module):
    """A sequence of blocks; the model repeats this."""

    def __init__(
        self, config: LanguageModelConfig, blocks: tuple[BlockConfig, ...], *, rngs: nnx.Rngs
    ) -> None:
        self.blocks = nnx.List([Block(config, block, rngs=rngs) for block in blocks])
        self.leaders = tuple(leaders([block.mixer for block in blocks]).items())
        for number in {number for pair in self.leaders for number in pair}:
            self.blocks[number].in_group = True
        for number, leader in self.leaders:
            follower: Any = self.blocks[number].mixer
            self.blocks[leader].is_followed |= follower.follows
        if config.lora is not None:
            config.lora.attach(self, rngs=rngs)

    def __call__(self, x: Between, document_ids: Int[Array, "b t"] | None) -> Between:
        """Applies the blocks in turn."""
        states = None
        for block in self.blocks:
            x, states = block.in_period(x, document_ids, states)
        return x

    def init_cache(self, batch_size: int, max_length: int | None, options: dict) -> list:
        """Returns an empty cache per block."""
        return [block.init_cache(batch_size, max_length, options) for block in self.blocks]

    def extend(self, x: Between, caches: list, lengths: Array | None) -> tuple[Between, list]:
        """Applies the blocks to the next tokens of a stream; returns their next caches too."""
        new, leaders = [], dict(self.leaders)
        for number, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            source = new[leaders[number]] if number in leaders else None
            x, *of_block = block.extend(x, cache, lengths, source)
            new.append(of_block)
        return x, [cache for cache, _ in new]
