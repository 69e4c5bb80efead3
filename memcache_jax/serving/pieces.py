"""Arrays in pieces, of which equal ones are kept once."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

_PIECE_BYTES = 1 << 10


class Split(NamedTuple):
    """An array's pieces by their digests.

    Attributes:
      axis: along which they follow each other.
      digests: of each.
    """

    axis: int
    digests: tuple[bytes, ...]


class Pieces:
    """Pieces by their digests, and how many arrays have each.

    Attributes:
      nbytes: of all pieces.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._held: dict[bytes, np.ndarray] = {}
        self._users: dict[bytes, int] = {}

    def __iter__(self) -> Iterator[tuple[bytes, np.ndarray]]:
        return iter(self._held.items())

    def add(self, pieces: dict[bytes, np.ndarray], arrays: list[Split]) -> None:
        """Keeps arrays whose pieces these are, as far as it has them not."""
        for digest in _uses(arrays):
            if digest not in self._held:
                self._held[digest] = pieces[digest]
                self.nbytes += pieces[digest].nbytes
            self._users[digest] = self._users.get(digest, 0) + 1

    def drop(self, arrays: list[Split]) -> None:
        """Forgets arrays, with the pieces that no other has."""
        for digest in _uses(arrays):
            self._users[digest] -= 1
            if not self._users[digest]:
                self.nbytes -= self._held.pop(digest).nbytes
                del self._users[digest]

    def of(self, arrays: list[Split]) -> list[list[np.ndarray]]:
        """The pieces of each array."""
        return [[self._held[digest] for digest in array.digests] for array in arrays]


def axis_of(array: np.ndarray) -> int:
    """The axis of slots, of tokens or of buckets; of other arrays one that is not cut.

    Arrays of a stack are (layers, rows, heads, slots, ...), and on the host (layers, slots, ...).
    """
    return 3 if array.ndim > 4 else min(1, array.ndim - 1) if array.ndim else 0


def split(arrays: list[np.ndarray], axes: list[int]) -> tuple[dict[bytes, np.ndarray], list[Split]]:
    """Cuts arrays along their axes, into their parts, or several together up to 1 KiB."""
    pieces: dict[bytes, np.ndarray] = {}
    splits = []
    for array, axis in zip(arrays, axes, strict=True):
        parts = [array]
        if array.ndim and array.size:
            count = max(1, _PIECE_BYTES * array.shape[axis] // array.nbytes)
            parts = np.split(array, range(count, array.shape[axis], count), axis)
        digests = []
        for part in parts:
            part = np.ascontiguousarray(part).reshape(part.shape)
            digest = hashlib.blake2b(f"{part.dtype} {part.shape}".encode(), digest_size=32)
            content: Any = part.reshape(-1).view(np.uint8)
            digest.update(content)
            # A copy, not a view that would keep the whole array.
            pieces.setdefault(digest.digest(), part.copy() if part.base is not None else part)
            digests.append(digest.digest())
        splits.append(Split(axis, tuple(digests)))
    return pieces, splits


def join(pieces: list[list[np.ndarray]], arrays: list[Split]) -> list[np.ndarray]:
    """The arrays of these pieces, which share no memory with them."""
    return [
        np.concatenate(parts, array.axis) if parts[0].ndim else parts[0].copy()
        for parts, array in zip(pieces, arrays, strict=True)
    ]


def _uses(arrays: list[Split]) -> set[bytes]:
    return {digest for array in arrays for digest in array.digests}
