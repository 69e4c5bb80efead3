"""Models of the paper's tables and related ones, by name and size.

A name is ``"transformer"``, or a write rule or hybrid with an optional variant: ``"titans"``,
``"titans_grm"``, ``"samba_ssc"``. ``NAMES`` and ``SIZES`` list them all.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from memcache_jax import memories
from memcache_jax._checks import check_choice, check_integer
from memcache_jax.aggregation import GRM, Aggregation, Residual, Soup
from memcache_jax.memories import Memory
from memcache_jax.nn import AttentionMixer, LanguageModelConfig, MemoryCachingMixer, Mixer
from memcache_jax.segmentation import Constant, Logarithmic, Segmentation
from memcache_jax.sparse import SSC


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model, its peak learning rate, and the number of its training tokens."""

    num_layers: int
    features: int
    num_heads: int
    learning_rate: float
    tokens: int


SIZES: Mapping[str, Size] = {
    "tiny": Size(4, 256, 4, 2e-3, 2**24),
    "170m": Size(12, 768, 16, 3e-3, 15 * 10**9),
    "340m": Size(24, 1024, 16, 1.5e-3, 15 * 10**9),
    "760m": Size(24, 1536, 16, 1.25e-3, 30 * 10**9),
    "1.3b": Size(18, 2048, 8, 7e-4, 100 * 10**9),
}
"""760m and 1.3b are from Table 6 of arXiv:2602.24281, 170m and 340m from arXiv:2501.00663; tiny is
ours, for a single machine.
"""

_RULES: dict[str, Memory] = {
    "linear": memories.LinearAttention(),
    "ssd": memories.SSD(),
    "gla": memories.GLA(),
    "swla": memories.SWLA(),
    "dla": memories.DLA(),
    "titans": memories.Titans(),
    "retnet": memories.RetNet(),
    "deltanet": memories.DeltaNet(),
    "gated_deltanet": memories.GatedDeltaNet(),
    "rwkv7": memories.RWKV7(),
    "kda": memories.KDA(),
    "gdn2": memories.GDN2(),
}
# Memory blocks alternate with sliding-window attention: Samba (arXiv:2406.07522) with Mamba, Titans
# (MAL, memory as a layer) with its own memory.
_HYBRIDS: dict[str, Memory] = {"samba": memories.SSD(), "titans_mal": memories.Titans()}
_WINDOW = 2048

_VARIANTS: Mapping[str, tuple[Aggregation, Callable[[int], Segmentation]]] = {
    "residual": (Residual(), Constant),
    "grm": (GRM(), Constant),
    "soup": (Soup(), Constant),
    "ssc": (SSC(top_k=4), Constant),  # the paper does not state its k
    "log_linear": (GRM(), Logarithmic),  # Log-Linear++ (Sec. 4.3)
}
_ONE_SEGMENT = 2**30  # longer than any sequence: the rule alone, with no cached state


# The rule or hybrid of each name, and its variant or None.
_PARTS: Mapping[str, tuple[str, str | None]] = {
    base if variant is None else f"{base}_{variant}": (base, variant)
    for base in (*_RULES, *_HYBRIDS)
    for variant in (None, *_VARIANTS)
}

NAMES: tuple[str, ...] = ("transformer", *_PARTS)
"""Transformer++, and every rule and hybrid alone and with each variant."""


def mixers(name: str, *, segment: int = 256, top_k: int = 4) -> tuple[Mixer, ...]:
    """Returns the mixers of a preset's consecutive blocks.

    The chunk size of a deep memory becomes its greatest common divisor with the segment size, even
    for the rule alone, so that a rule and its variants share one chunk size.

    Args:
      name: one of ``NAMES``.
      segment: segment size C.
      top_k: number of cached states that SSC reads.

    Raises:
      ValueError: for an unknown name, or a segment below 1.

    Example:
      >>> import memcache_jax as mc
      >>> mc.presets.mixers("swla_ssc", segment=8, top_k=2)[0].aggregation
      SSC(gate='content', pooling='mean', num_keys=1, exact=0, top_k=2, inner='grm', router=None)
    """
    check_choice("name", name, NAMES)
    segment = check_integer("segment", segment)
    if name == "transformer":
        return (AttentionMixer(),)
    base, variant = _PARTS[name]
    memory = (_RULES | _HYBRIDS)[base]
    if isinstance(memory, memories.DeepMemory):
        chunk = math.gcd(memory.chunk_size, segment)
        memory = dataclasses.replace(memory, chunk_size=chunk)
    if variant is None:
        aggregation, segmentation = Residual(), Constant(_ONE_SEGMENT)
    else:
        aggregation, kind = _VARIANTS[variant]
        segmentation = kind(segment)
    if isinstance(aggregation, SSC):
        aggregation = dataclasses.replace(aggregation, top_k=top_k)
    mixer = MemoryCachingMixer(memory, aggregation, segmentation)
    return (mixer,) if base in _RULES else (mixer, AttentionMixer(window=_WINDOW))


def language_model(
    name: str, size: str, *, segment: int = 256, vocab_size: int = 32_000, **changes: Any
) -> LanguageModelConfig:
    """Returns the shape of a preset's language model.

    Args:
      name: one of ``NAMES``.
      size: one of ``SIZES``.
      segment: segment size C; 256 in the paper's Table 1, at a context of 4096.
      vocab_size: number of token ids.
      **changes: other fields of ``LanguageModelConfig``. By default, all sizes but tiny use
        bfloat16 and rematerialise blocks.

    Raises:
      ValueError: for an unknown name or size, or fields that ``LanguageModelConfig`` rejects.

    Example:
      >>> import memcache_jax as mc
      >>> config = mc.presets.language_model("titans_grm", "760m")
      >>> config.num_layers, config.features, config.mixers[0].segmentation
      (24, 1536, Constant(size=256))
    """
    check_choice("size", size, tuple(SIZES))
    shape, large = SIZES[size], size != "tiny"
    fields: dict[str, Any] = dict(
        vocab_size=vocab_size,
        num_layers=shape.num_layers,
        features=shape.features,
        num_heads=shape.num_heads,
        mixers=mixers(name, segment=segment),
        dtype="bfloat16" if large else "float32",
        remat=large,
    )
    return LanguageModelConfig(**(fields | changes))
