"""Checks of token ids, and sizes of buffers, before any compilation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memcache_jax._typing import Array, Int
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
    mixers = getattr(getattr(model, "config", None), "mixers", ())
    parts = [getattr(mixer, "segmentation", None) for mixer in mixers]
    limits = [part.longest for part in parts if isinstance(part, Segmentation)]
    return min((limit for limit in limits if limit is not None), default=None)


def check_prompt(prompt: jax.typing.ArrayLike, model: Any) -> Int[Array, "b t"]:
    """Returns the prompt as int32, or raises ValueError."""
    traced = isinstance(prompt, Tracer)
    array: Any = prompt if traced else np.asarray(prompt)
    shape, dtype = array.shape, array.dtype
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"prompt must be integers of shape (b, t), got {dtype} {shape}")
    if 0 in shape:
        raise ValueError(f"prompt must not be empty, got shape {shape}")
    if not traced:
        _check_ids("prompt", int(array.min()), int(array.max()), model)
    return jnp.asarray(array.astype(jnp.int32))


def check_stop(stop_token: int | Sequence[int] | None, model: Any) -> Int[Array, "stops"]:
    """Returns the tokens that end a row, or raises ValueError.

    They are filled up with -1, which is no token, so that few numbers of them are compiled.
    """
    stops = [] if stop_token is None else np.atleast_1d(stop_token).tolist()
    if stops:
        _check_ids("stop_token", min(stops), max(stops), model)
    size = max(_SMALLEST_STOPS, 1 << (len(stops) - 1).bit_length())
    return jnp.array(stops + [-1] * (size - len(stops)), jnp.int32)


def _check_ids(name: str, smallest: int, largest: int, model: Any) -> None:
    """Raises ValueError for ids outside the model's vocabulary."""
    limit = getattr(getattr(model, "config", None), "vocab_size", 2**31)
    if smallest < 0 or largest >= limit:
        raise ValueError(
            f"{name} must hold token ids from 0 to {limit - 1}, "
            f"got {smallest if smallest < 0 else largest}"
        )
