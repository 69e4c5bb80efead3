"""Configuration of a language model: the mixers of its blocks, and its sizes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
from flax import nnx

from memcache_jax._checks import (
    check_dtype,
    check_fields,
    check_flag,
    check_instance,
    check_integer,
    set_fields,
    shown,
)
from memcache_jax._typing import Exchange, Implementation, Start
from memcache_jax.aggregation import GRM, Aggregation
from memcache_jax.memories import Memory, Titans
from memcache_jax.nn.attention import Attention, check_attention
from memcache_jax.nn.feed_forward import FeedForward, GatedMLP
from memcache_jax.nn.groups import check_states, leaders
from memcache_jax.nn.lora import LoRA
from memcache_jax.nn.memory_caching import MemoryCaching, check_layer
from memcache_jax.nn.norms import Norm
from memcache_jax.nn.parallel import changed, side_by_side
from memcache_jax.nn.recurrent import RecurrentMixer
from memcache_jax.segmentation import Constant, Segmentation


@runtime_checkable
class Mixer(Protocol):
    """Describes a token mixer; each block builds its own from it."""

    def build(self, in_features: int, num_heads: int, **options: Any) -> nnx.Module:
        """Returns a module (b, t, d) -> (b, t, d); options: head_dim, dtype, param_dtype, rngs.

        With packed documents, the module is called with their ids (b, t) as a second argument. For
        streams it has ``init_cache(batch_size, max_length, **options)``, with the options of
        ``MemoryCaching``, and ``extend(x, cache, lengths)``, which returns the outputs and the
        next cache. A cache derives from ``MixerCache``, or has its methods.
        """
        ...


@dataclasses.dataclass(frozen=True)
class MemoryCachingMixer:
    """Blocks mix tokens with ``MemoryCaching``, whose arguments are the attributes.

    With ``states="previous"``, a layer of a language model caches no states. It reads those of the
    nearest earlier layer that has its own, as layers share keys and values in cross-layer attention
    (arXiv:2405.12981; arXiv:2602.24281 has no such layers)::

        y_t = Agg(M_1, ..., M_{s-1} of that layer; M_t; q_t)

    Query, connector, live memory and all parameters are the layer's own; the pooled keys are those
    of the other layer, which also gets gradients. Both layers need the same ``memory``,
    ``aggregation``, ``start``, ``bounded`` and ``Constant`` segmentation, and must be in one
    repetition of ``LanguageModelConfig.mixers``, or of a pattern of its ``blocks``. A stream then
    caches states for one layer of each group.

    With ``connector="previous"`` too, ``SSC`` reads the states i that the other layer chose for the
    same token and head, with its gates, the live memory's among them::

        y_t = gamma_t M_t(q_t) + sum_i gamma_i M_i(q_t)

    So the layers share one router: the others score nothing, and the router learns from them too.

    Raises:
      ValueError: as ``MemoryCaching``; with ``connector="previous"`` without ``SSC`` or for
        ``states="own"``; with ``states="previous"`` for other segments than ``Constant``, ``exact``
        tokens, several keys per state, or ``implementation="reference"``. The model's configuration
        refuses a group without a first layer or with unlike ones, and aggregations for which a
        stream keeps one sum of all states, such as ``Residual``; ``init_cache`` refuses a policy
        other than ``"error"``, ``rewind`` and ``keep_ends``; calls refuse meshes that divide time.

    Example:
      >>> import dataclasses, memcache_jax as mc
      >>> own = mc.nn.MemoryCachingMixer(mc.memories.DeltaNet(), mc.SSC(4), mc.Constant(64))
      >>> other = dataclasses.replace(own, states="previous")
      >>> config = mc.nn.LanguageModelConfig(257, 4, features=64, num_heads=4, mixers=(own, other))
      >>> [mixer.states for mixer in config.mixers]  # of four layers, two cache states
      ['own', 'previous']
    """

    memory: Memory = Titans()
    aggregation: Aggregation = GRM()
    segmentation: Segmentation = Constant(256)
    start: Start = "independent"
    connector: Literal["learned", "query", "previous"] = "learned"
    distances: int = 64
    bounded: bool = True
    states: Literal["own", "previous"] = "own"
    implementation: Implementation | None = None
    exchange: Exchange = "gather"

    def __post_init__(self) -> None:
        check_layer(
            *(self.memory, self.aggregation, self.segmentation, self.start, self.connector),
            *(self.implementation, self.exchange),
        )
        check_flag("bounded", self.bounded)
        check_states(
            self.states, self.connector, self.aggregation, self.segmentation, self.implementation
        )
        set_fields(self, distances=check_integer("distances", self.distances, 2))

    def build(self, in_features: int, num_heads: int, **options: Any) -> MemoryCaching:
        """Returns the layer."""
        return MemoryCaching(in_features, num_heads, **vars(self), **options)


@dataclasses.dataclass(frozen=True)
class AttentionMixer:
    """Blocks mix tokens with ``Attention``, whose arguments are the attributes."""

    window: int | None = None
    rope_base: float = 10_000.0
    implementation: Literal["xla", "cudnn"] | None = None

    def __post_init__(self) -> None:
        window, rope_base = check_attention(self.window, self.rope_base, self.implementation)
        set_fields(self, window=window, rope_base=rope_base)

    def build(self, in_features: int, num_heads: int, **options: Any) -> Attention:
        """Returns the layer."""
        return Attention(in_features, num_heads, **vars(self), **options)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A residual block: x + scale mixer(norm(x)), then x + scale mlp(norm(x)).

    Attributes:
      mixer: how tokens are mixed.
      mlp: what is done to each token alone; None for nothing.
      norm: of both.
      norm_last: whether the norm is of the mixer's and the MLP's outputs: x + norm(mixer(x)).
      residual_scale: the scale.
    """

    mixer: Mixer
    mlp: FeedForward | None = None
    norm: Norm = Norm()
    norm_last: bool = False
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        _check_mixer(self.mixer)
        check_instance("norm", self.norm, Norm, "an mc.nn.Norm")
        check_fields(self, numbers=("residual_scale",), flags=("norm_last",))
        wrong = isinstance(self.mlp, type) or not isinstance(self.mlp, FeedForward)
        if self.mlp is not None and wrong:
            raise ValueError(f"mlp must be an object such as GatedMLP(64), got {shown(self.mlp)}")


def _check_mixer(mixer: Any) -> None:
    if isinstance(mixer, type) or not isinstance(mixer, Mixer):
        raise ValueError(
            "mixers must be objects such as mc.nn.MemoryCachingMixer(), or others with "
            f"their method build, got {shown(mixer)}"
        )


def _check_shared_values(mixers: tuple[Mixer, ...]) -> None:
    """Raises ValueError where a layer mixes in values that no layer before it shares."""
    shared = None
    for mixer in mixers:
        for name, part in side_by_side(mixer).items():
            within = name and isinstance(part, RecurrentMixer)
            if within and (part.value.first is not None or part.shares_values):
                raise ValueError(
                    f"{name} of {type(mixer).__name__} can neither share values nor mix them in"
                )
        if not isinstance(mixer, RecurrentMixer):
            continue
        size = mixer.value.heads * mixer.value.dim
        if mixer.value.first is not None and size != shared:
            before = "none is shared before it" if shared is None else f"{shared} are shared"
            raise ValueError(f"a mixer mixes {size} channels of a first layer's values, {before}")
        if mixer.shares_values:
            if shared is not None:
                raise ValueError("only one mixer may share its values, got several")
            shared = size


Stacks: TypeAlias = tuple[tuple[tuple[BlockConfig, ...], int], ...]
"""Sequences of blocks, and how often each is repeated before the next begins."""


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """The shape of a ``LanguageModel``.

    Attributes:
      vocab_size: number of token ids.
      num_layers: blocks; a multiple of the number of mixers.
      features: model dimension d.
      num_heads: number of heads in every mixer.
      mixers: the mixers of consecutive blocks, repeated over the depth.
      head_dim: dimension of a head; ``features // num_heads`` by default.
      mlp_features: hidden width of the SwiGLU MLP, by default 8/3 d rounded up to a multiple of
        64; 0 for blocks without an MLP.
      blocks: all ``num_layers`` blocks one by one; ``mixers`` and ``mlp_features`` are then
        ignored.
      norm: of the last block's output.
      embedding_norm: of the embeddings, before the first block; None for none.
      embedding_scale: a factor of the embeddings.
      logit_scale: a factor of the logits.
      tie_embeddings: whether the output layer is the embedding's transpose.
      scan_layers: whether layers that repeat are stacked and run by a loop, so that depth costs no
        compile time. False for one program of all layers, which need not copy a layer's parameters
        out of the stack: decoding on CPUs is then up to twice as fast.
      lora: the adapters of the blocks' projections; None for none.
      remat: whether the backward pass recomputes each block's activations.
      keep_states: whether, with ``remat``, what the memories write (states before each chunk and
        after each segment, live reads) is kept for the backward pass instead of being recomputed.
      offload_states: the same, in the host's memory.
      dtype: dtype of the arithmetic; parameters and logits are float32 or wider.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: if ``num_layers`` is not a multiple of the number of mixers, a size is below 1,
        ``keep_states`` or ``offload_states`` is set without ``remat``, or both are, or a value is
        of the wrong kind.
    """

    vocab_size: int
    num_layers: int
    features: int
    num_heads: int
    mixers: tuple[Mixer, ...] = (MemoryCachingMixer(),)
    head_dim: int | None = None
    mlp_features: int | None = None
    blocks: tuple[BlockConfig, ...] | None = None
    norm: Norm = Norm()
    embedding_norm: Norm | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    tie_embeddings: bool = False
    scan_layers: bool = True
    lora: LoRA | None = None
    remat: bool = False
    keep_states: bool = False
    offload_states: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_fields(
            self,
            sizes=("vocab_size", "num_layers", "features", "num_heads", "head_dim"),
            numbers=("embedding_scale", "logit_scale"),
            flags=("tie_embeddings", "scan_layers", "remat", "keep_states", "offload_states"),
            optional=("head_dim",),
        )
        hidden = check_integer("mlp_features", self.mlp_features, 0, optional=True)
        set_fields(self, mlp_features=hidden)
        check_instance("norm", self.norm, Norm, "an mc.nn.Norm")
        if self.embedding_norm is not None:
            check_instance("embedding_norm", self.embedding_norm, Norm, "an mc.nn.Norm")
        if self.lora is not None:
            check_instance("lora", self.lora, LoRA, "an mc.nn.LoRA")
        for name in ("dtype", "param_dtype"):
            check_dtype(name, getattr(self, name))
        if isinstance(self.mixers, list):  # which has no hash
            set_fields(self, mixers=tuple(self.mixers))
        check_instance("mixers", self.mixers, tuple, "a tuple of mixers")
        for mixer in self.mixers:
            _check_mixer(mixer)
        if self.blocks is not None:
            check_instance("blocks", self.blocks, (tuple, list), "BlockConfigs")
            blocks = tuple(self.blocks)
            for block in blocks:
                check_instance("blocks", block, BlockConfig, "BlockConfigs")
            if len(blocks) != self.num_layers:
                raise ValueError(f"got {len(blocks)} blocks for num_layers={self.num_layers}")
            mixers = tuple(block.mixer for block in blocks)
            set_fields(self, blocks=blocks, mixers=mixers)
        if not self.mixers or self.num_layers % len(self.mixers):
            raise ValueError(
                f"num_layers={self.num_layers} must be a multiple of the number of mixers, "
                f"got {len(self.mixers)}"
            )
        for name in ("keep_states", "offload_states"):
            if getattr(self, name) and not self.remat:
                raise ValueError(f"{name} needs remat=True, got remat=False")
        if self.keep_states and self.offload_states:
            raise ValueError("states are kept or offloaded: keep_states and offload_states are set")
        if self.remat and not self.scan_layers:
            raise ValueError(
                "remat recomputes layer by layer: it needs scan_layers=True, got False"
            )
        _check_shared_values(self.mixers * (self.num_layers // len(self.mixers)))
        for blocks, _ in self.stacks:
            leaders([block.mixer for block in blocks])

    @functools.cached_property
    def stacks(self) -> Stacks:
        """The blocks, as sequences that are repeated."""
        if self.blocks is not None:
            return _stacks_of(self.blocks) if self.scan_layers else ((self.blocks, 1),)
        hidden = self.mlp_features
        if hidden is None:
            hidden = -(-8 * self.features // (3 * 64)) * 64
        mlp = GatedMLP(hidden) if hidden else None
        period = tuple(BlockConfig(mixer, mlp) for mixer in self.mixers)
        repeats = self.num_layers // len(self.mixers)
        return ((period, repeats),) if self.scan_layers else ((period * repeats, 1),)

    @property
    def shared_values(self) -> int | None:
        """Channels of the values that the first layer hands to later ones; None if it does not."""
        shared = (m for m in self.mixers if isinstance(m, RecurrentMixer) and m.shares_values)
        return next((mixer.value.heads * mixer.value.dim for mixer in shared), None)

    def with_mixers(self, change: Callable[[Mixer], Mixer]) -> "LanguageModelConfig":
        """The configuration with each mixer changed, also those that are parts of others."""
        if self.blocks is None:
            mixers = tuple(changed(mixer, change) for mixer in self.mixers)
            return dataclasses.replace(self, mixers=mixers)
        blocks = (
            dataclasses.replace(block, mixer=changed(block.mixer, change)) for block in self.blocks
        )
        return dataclasses.replace(self, blocks=tuple(blocks))


def _stacks_of(blocks: tuple[BlockConfig, ...]) -> Stacks:
    """Splits a list of blocks into the longest runs that repeat a sequence."""
    stacks: list[tuple[tuple[BlockConfig, ...], int]] = []
    while blocks:
        period, repeats = _longest_repetition(blocks)
        if repeats == 1 and stacks and stacks[-1][1] == 1:  # one by one: let them be one sequence
            period = stacks.pop()[0] + period
        stacks.append((period, repeats))
        blocks = blocks[repeats * (len(period) if repeats > 1 else 1) :]
    return tuple(stacks)


def _longest_repetition(blocks: tuple[BlockConfig, ...]) -> tuple[tuple[BlockConfig, ...], int]:
    """The sequence at the list's beginning whose repetitions cover most of it, or one block."""
    best = blocks[:1], 1
    for size in range(1, len(blocks) // 2 + 1):
        repeats = 1
        while blocks[repeats * size : (repeats + 1) * size] == blocks[:size]:
            repeats += 1
        if repeats > 1 and repeats * size > best[1] * len(best[0]):
            best = blocks[:size], repeats
    return best
