"""Token ids of one prompt, and the digests that they are known by."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from memcache_jax._checks import as_numpy, check_ids
from memcache_jax._typing import Array, Int

Ids: TypeAlias = Sequence[int] | np.ndarray | Array
"""Token ids, (t,)."""


def as_ids(tokens: Any) -> Int[np.ndarray, "t"]:
    """Returns token ids (t,) as int32, or raises ValueError."""
    ids = as_numpy("tokens", tokens)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"tokens must be integers (t,), got {ids.dtype} {ids.shape}")
    if ids.size:
        check_ids("tokens", int(ids.min()), int(ids.max()), 2**31)
    return ids.astype(np.int32)


def key_of(tokens: Int[np.ndarray, "t"]) -> bytes:
    """The digest of all tokens."""
    return next(keys_of(tokens, [len(tokens)]))


def keys_of(tokens: Int[np.ndarray, "t"], lengths: list[int]) -> Iterator[bytes]:
    """The digests of the first so many tokens, for growing numbers."""
    digest, begin = hashlib.blake2b(digest_size=32), 0
    for end in lengths:
        digest.update(tokens[begin:end].tobytes())
        yield digest.copy().digest()
        begin = end
