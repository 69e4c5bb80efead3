"""Checks of token ids, and sizes of buffers, before any compilation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memcache_jax._checks import as_numpy, check_ids, shown
from memcache_jax._typing import Array, Int
from memcache_jax.nn.parallel import side_by_side
from memcache_jax.segmentation import Segmentation

_SMALLEST_BUFFER = 64
_SMALLEST_STOPS = 8


def buffer_size(tokens: int, most: int | None = None) -> int:
    """Rounds up to a power of two, at least 64, so that few sizes are compiled.

    Does not round beyond ``most``, as from ``longest``.
    """
    size = max(_SMALLEST_BUFFER, 1 << (tokens - 1).bit_length())
    return size if most is None else max(tokens, min(size, most))


def longest(model: Any) -> int | None:
    """Returns how many tokens the segments of a model's layers hold; None for any number."""
    limits = [part.longest for part in segmentations(model)]
    return min((limit for limit in limits if limit is not None), default=None)


def segmentations(model: Any) -> list[Segmentation]:
    """Those of a model's layers, and of the parts of layers that consist of several."""
    mixers = getattr(getattr(model, "config", None), "mixers", ())
    parts = (part for mixer in mixers for part in side_by_side(mixer).values())
    found = (getattr(part, "segmentation", None) for part in parts)
    return [part for part in found if isinstance(part, Segmentation)]


def check_prompt(
    prompt: jax.typing.ArrayLike, model: Any
) -> Int[np.ndarray, "b t"] | Int[Array, "b t"]:
    """Returns the prompt (b, t) as int32, on the host unless it is traced, or raises ValueError."""
    traced = isinstance(prompt, Tracer)
    array: Any = prompt if traced else as_numpy("prompt", prompt)
    shape, dtype = array.shape, array.dtype
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"prompt must be integers of shape (b, t), got {dtype} {shape}")
    if 0 in shape:
        raise ValueError(f"prompt must not be empty, got shape {shape}")
    if not traced:
        check_ids("prompt", int(array.min()), int(array.max()), _vocabulary(model))
    return array.astype(jnp.int32)


def check_stop(stop_token: int | Sequence[int] | None, model: Any) -> Int[np.ndarray, "stops"]:
    """Returns the tokens that end a row, or raises ValueError.

    They are filled up with -1, which is no token, so that few numbers of them are compiled.
    """
    stops = np.zeros(0, int) if stop_token is None else as_numpy("stop_token", stop_token)
    if stops.ndim > 1 or (stops.size and not np.issubdtype(stops.dtype, np.integer)):
        raise ValueError(f"stop_token must be a token id or several, got {shown(stop_token)}")
    if stops.size:
        check_ids("stop_token", int(stops.min()), int(stops.max()), _vocabulary(model))
    size = max(_SMALLEST_STOPS, 1 << (stops.size - 1).bit_length())
    stops = np.pad(stops.reshape(-1), (0, size - stops.size), constant_values=-1)
    return stops.astype(np.int32)


def _vocabulary(model: Any) -> int:
    """The number of token ids, of models that tell it."""
    return getattr(getattr(model, "config", None), "vocab_size", 2**31)
