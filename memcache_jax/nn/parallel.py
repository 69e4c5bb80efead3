"""Two token mixers side by side, such as attention beside a state space model."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.streaming.protocol import MixerCache


@dataclasses.dataclass(frozen=True)
class ParallelMixer:
    """Blocks mix tokens with the sum of two mixers, as Falcon-H1 does (arXiv:2507.22448).

    y = left_scale left(x) + right_scale right(x).

    Attributes:
      left: a mixer.
      right: another one.
      left_scale: a factor of its output.
      right_scale: a factor of the other's.
    """

    left: Any
    right: Any
    left_scale: float = 1.0
    right_scale: float = 1.0

    parts: ClassVar[tuple[str, ...]] = ("left", "right")

    def __post_init__(self) -> None:
        check_parts(self)
        _checks.check_fields(self, numbers=("left_scale", "right_scale"))

    def build(self, in_features: int, num_heads: int, **options: Any) -> "Parallel":
        """Returns the layer."""
        return Parallel(self, in_features, num_heads, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParallelCache(MixerCache):
    """A stream's past in both mixers."""

    left: Any
    right: Any

    nested = ("left", "right")

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.left.batch_size

    @classmethod
    def of(cls, layers: tuple[Any, Any], *sizes: Any, **options: Any) -> "ParallelCache":
        """Empty caches of two layers, of what their ``init_cache`` takes."""
        return cls(*(layer.init_cache(*sizes, **options) for layer in layers))

    @property
    def position(self) -> Array:
        """Tokens taken so far by each row, (b,)."""
        return self.left.position

    @property
    def rewindable(self) -> Array | None:
        """By how many tokens each row can go back, (b,); None where none can."""
        both = [getattr(cache, "rewindable", None) for cache in (self.left, self.right)]
        return None if any(one is None for one in both) else both[0]

    def rewound(self, tokens: Int[Array, "b"]) -> "ParallelCache":
        """As ``MixerCache.rewound``."""
        return ParallelCache(self.left.rewound(tokens), self.right.rewound(tokens))

    def borders(self, length: int) -> np.ndarray:
        """As ``MixerCache.borders``."""
        return np.intersect1d(self.left.borders(length), self.right.borders(length))

    def returned(
        self, position: Int[Array, "b"], rows: Bool[Array, "b"]
    ) -> tuple["ParallelCache", Bool[Array, "b"]]:
        """As ``MixerCache.returned``."""
        both = (cache.returned(position, rows) for cache in (self.left, self.right))
        (left, of_left), (right, of_right) = both
        return ParallelCache(left, right), of_left & of_right

    @property
    def max_length(self) -> int | None:
        """Most tokens per row; None for any number."""
        bounds = [getattr(cache, "max_length", None) for cache in (self.left, self.right)]
        return min((bound for bound in bounds if bound is not None), default=None)


class Parallel(nnx.Module):
    """The sum of two mixers' outputs.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> mixer = mc.nn.ParallelMixer(mc.nn.AttentionMixer(), mc.nn.AttentionMixer(window=4))
      >>> mixer.build(16, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 10, 16))).shape
      (1, 10, 16)
    """

    def __init__(
        self, mixer: ParallelMixer, in_features: int, num_heads: int, **options: Any
    ) -> None:
        self.left_scale, self.right_scale = mixer.left_scale, mixer.right_scale
        self.left = mixer.left.build(in_features, num_heads, **options)
        self.right = mixer.right.build(in_features, num_heads, **options)

    def __call__(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Mixes tokens causally; no document sees another."""
        documents = () if document_ids is None else (document_ids,)
        return self._sum(self.left(x, *documents), self.right(x, *documents))

    def init_cache(
        self, batch_size: int, max_length: int | None = None, **options: Any
    ) -> ParallelCache:
        """Returns an empty cache for ``extend``, of both mixers."""
        return ParallelCache.of((self.left, self.right), batch_size, max_length, **options)

    def extend(
        self, x: Float[Array, "b t d"], cache: ParallelCache, lengths: Any = None
    ) -> tuple[Float[Array, "b t d"], ParallelCache]:
        """Continues a stream in both mixers."""
        _checks.check_instance("cache", cache, ParallelCache, "a ParallelCache")
        mixers: tuple[Any, Any] = self.left, self.right
        left, of_left = mixers[0].extend(x, cache.left, lengths)
        right, of_right = mixers[1].extend(x, cache.right, lengths)
        return self._sum(left, right), ParallelCache(of_left, of_right)

    def _sum(self, left: Array, right: Array) -> Array:
        left = left if self.left_scale == 1 else self.left_scale * left
        return left + (right if self.right_scale == 1 else self.right_scale * right)


def parts_of(mixer: Any) -> dict[str, Any]:
    """The mixers that a mixer consists of, by the names of its layers; none of most."""
    return {name: getattr(mixer, name) for name in getattr(mixer, "parts", ())}


def check_parts(mixer: Any) -> None:
    """Raises ValueError for parts that are no mixers."""
    for name, part in parts_of(mixer).items():
        if isinstance(part, type) or not hasattr(part, "build"):
            raise ValueError(
                f"{name} must be a mixer such as mc.nn.AttentionMixer(), got {_checks.shown(part)}"
            )


def changed(mixer: Any, change: Callable[[Any], Any]) -> Any:
    """The mixer with a change, of each of its parts where it has some."""
    parts = parts_of(mixer)
    if not parts:
        return change(mixer)
    new = {name: changed(part, change) for name, part in parts.items()}
    return dataclasses.replace(mixer, **new)


def side_by_side(mixer: Any, name: str = "") -> dict[str, Any]:
    """The mixers that a mixer consists of by their names, such as ``"left"``; "" for one.

    Those within another have its name before theirs, as ``"left.right"``.
    """
    parts = parts_of(mixer)
    if not parts:
        return {name: mixer}
    before = f"{name}." if name else ""
    found: dict[str, Any] = {}
    for each, part in parts.items():
        found |= side_by_side(part, before + each)
    return found
