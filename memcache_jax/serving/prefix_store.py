"""Caches of prompts' beginnings, so that what prompts share is read once."""

import collections
import json
import os
import threading
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._checks import check_ids, check_instance, check_integer, check_path
from memcache_jax._typing import Array, Float
from memcache_jax.adaptive import Adaptive
from memcache_jax.generation.apart import apart
from memcache_jax.generation.generate import extend_in_place
from memcache_jax.generation.prompts import buffer_size, longest, segmentations
from memcache_jax.nn import LanguageModel
from memcache_jax.nn.model_cache import LanguageModelCache
from memcache_jax.serving.ids import Ids, as_ids, key_of, keys_of
from memcache_jax.serving.pieces import Pieces, Split, axis_of, join, split

# What NumPy, JSON and zipfile raise for damaged files, and for files of other kinds.
_DAMAGE = (OSError, LookupError, EOFError, RuntimeError, TypeError, ValueError)


class _Entry(NamedTuple):
    """A cache after ``length`` tokens."""

    length: int
    arrays: list[Split]


class _Like(NamedTuple):
    """What all caches of a store have in common."""

    structure: Any
    shapes: list[tuple[tuple[int, ...], str]]
    shardings: list[Any]


class PrefixStore:
    """Keeps caches of one row by the tokens they have taken, and finds those that begin a prompt.

    A recurrent cache cannot be cut at any token, as keys and values can: it is found where it was
    inserted, which ``prefill`` does at the ends of segments. Caches are kept in pieces by their
    content, a state of a slot or a run of keys each. So a segment's state is kept once, however
    many prompts and later caches have it; a cache costs what is its own, which is mostly its live
    states. All methods may be called by several threads.

    The store does not know the model: use one for each, and another after its parameters change.

    Args:
      max_bytes: most bytes of arrays, in the memory of the host. Beyond it, caches go that have not
        been found or inserted for longest.

    Raises:
      ValueError: for a size below 1.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=1, features=32, num_heads=2)
      >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
      >>> store, empty = mc.PrefixStore(max_bytes=10**8), model.init_cache(1, 100)
      >>> told = list(range(1, 41))
      >>> logits, cache, known = store.prefill(model, told, empty, every=16)
      >>> store.prefill(model, [*told[:35], 7, 8], empty, every=16)[2]
      32
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = check_integer("max_bytes", max_bytes, most=1 << 62)
        self._lock = threading.Lock()
        self._pieces = Pieces()
        self._entries: collections.OrderedDict[bytes, _Entry] = collections.OrderedDict()
        self._lengths: collections.Counter[int] = collections.Counter()
        self._like: _Like | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that it keeps."""
        return self._pieces.nbytes

    def __len__(self) -> int:
        """Number of caches."""
        return len(self._entries)

    def insert(self, tokens: Ids, cache: LanguageModelCache) -> bool:
        """Keeps a cache of one row, which stays the caller's, after these tokens (t,).

        Returns:
          Whether it is kept: not if it alone has more than ``max_bytes``.

        Raises:
          ValueError: for tokens that are not integers (t,), or a cache of another number of rows or
            tokens, or of another shape than those before.
        """
        tokens = as_ids(tokens)
        _check_cache("cache", cache)
        if cache.position.shape != (1,) or int(cache.position[0]) != len(tokens):
            raise ValueError(
                f"the cache must be of one row, after the {len(tokens)} tokens; it has taken "
                f"{cache.position.tolist()}"
            )
        like = _like(cache)
        # Copies: later calls donate the cache, and with it what NumPy sees of its memory.
        arrays = [np.array(x) for x in jax.device_get(jax.tree.leaves(cache))]
        pieces, splits = split(arrays, [axis_of(x) for x in arrays])
        key = key_of(tokens)
        with self._lock:
            if self._like is None:
                self._like = like
            _check_same(like, self._like)
            if sum(piece.nbytes for piece in pieces.values()) > self.max_bytes:
                return False
            if key in self._entries:
                self._remove(key)
            self._pieces.add(pieces, splits)
            self._entries[key] = _Entry(len(tokens), splits)
            self._lengths[len(tokens)] += 1
            while self.nbytes > self.max_bytes:
                self._remove(next(iter(self._entries)))
        return True

    def match(self, tokens: Ids) -> tuple[LanguageModelCache | None, int]:
        """Returns a cache of the longest known beginning of tokens (t,), and its length.

        It is at most t - 1 tokens long, so that there is one to ask for what follows; None and 0 if
        none is known. The cache is the caller's own.
        """
        tokens = as_ids(tokens)
        with self._lock:
            lengths = sorted(n for n in self._lengths if n < len(tokens))
            keys = list(keys_of(tokens, lengths))
            key = next((key for key in reversed(keys) if key in self._entries), None)
            if key is None or self._like is None:
                return None, 0
            self._entries.move_to_end(key)
            entry, like = self._entries[key], self._like
            pieces = self._pieces.of(entry.arrays)
        joined = zip(join(pieces, entry.arrays), like.shardings, strict=True)
        arrays = [jax.device_put(x, sharding) for x, sharding in joined]
        return jax.tree.unflatten(like.structure, arrays), entry.length

    def prefill(
        self,
        model: LanguageModel,
        tokens: Ids,
        empty: LanguageModelCache,
        *,
        every: int | None = None,
    ) -> tuple[Float[Array, "vocab"], LanguageModelCache, int]:
        """Reads a prompt (t,), as far as its beginning is not known, and keeps what it found.

        It reads pieces that end at multiples of ``every``, after each of which it inserts the
        cache, and after the last token. Where what was known ends at such a multiple, it computes
        what a cold start does, and outputs are the same bit for bit; elsewhere up to rounding. It
        also takes a conversation back to any of its tokens, for at most ``every`` tokens read
        again.

        Args:
          model: the model.
          tokens: the prompt's ids.
          empty: an empty cache of one row, which stays the caller's: ``model.init_cache(1, ...)``.
          every: tokens between the caches that are kept; by default those of the model's longest
            segments.

        Returns:
          The logits after the last token, the cache, and how many tokens were known.

        Raises:
          ValueError: for tokens outside the vocabulary or none, or more than the cache holds.
        """
        check_instance("model", model, LanguageModel, "an mc.nn.LanguageModel")
        ids = as_ids(tokens)
        if not len(ids):
            raise ValueError("give at least one token, got none")
        check_ids("tokens", int(ids.min()), int(ids.max()), model.config.vocab_size)
        _check_cache("empty", empty)
        step = _longest_segment(model) if every is None else check_integer("every", every)
        empty.check_room((1, len(ids)))
        with self._lock:
            if self._like is not None:  # the caches that are found have the room of these
                _check_same(_like(empty), self._like)
        cache, known = self.match(ids)
        if cache is None:
            cache = jax.tree.map(jnp.copy, empty)
        graph, state = apart(model)
        logits: Any = None
        ends = [*range((known // step + 1) * step, len(ids), step), len(ids)]
        for begin, end in zip([known, *ends], ends, strict=False):
            size = buffer_size(end - begin, longest(model))
            piece = np.pad(ids[begin:end], (0, size - (end - begin)))[None]
            count = jnp.array([end - begin])
            cache, logits = extend_in_place(state, jnp.asarray(piece), count, cache, graph=graph)
            self.insert(ids[:end], cache)
        return logits[0], cache, known

    def save(self, path: str | os.PathLike) -> None:
        """Writes all caches into one file, in place of an earlier one.

        Raises:
          ValueError: if ``path`` is not a path, or is that of a folder or a device.
        """
        path = check_path("path", path)
        if path.exists() and not path.is_file():
            raise ValueError(f"path must be that of a file, new or existing, got {path}")
        with self._lock:
            entries = [
                [key.hex(), e.length, [[a.axis, [d.hex() for d in a.digests]] for a in e.arrays]]
                for key, e in self._entries.items()
            ]
            pieces = dict(self._pieces)
            like = self._like
        index = dict(
            entries=entries,
            structure=None if like is None else str(like.structure),
            shapes=None if like is None else like.shapes,
            pieces={d.hex(): [x.dtype.name, x.shape] for d, x in pieces.items()},
        )
        text = np.frombuffer(json.dumps(index).encode(), np.uint8)
        flat: dict[str, Any] = {d.hex(): x.reshape(-1).view(np.uint8) for d, x in pieces.items()}
        new = path.with_name(f"{path.name}.new")
        with new.open("wb") as file:
            np.savez(file, index=text, **flat)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, like: LanguageModelCache, max_bytes: int
    ) -> "PrefixStore":
        """Reads the file of ``save``, of caches such as ``model.init_cache(1, ...)``.

        Raises:
          ValueError: if the caches of the file are of another kind or shape, or it is damaged.
        """
        path = check_path("path", path)
        _check_cache("like", like)
        store, wanted = cls(max_bytes), _like(like)
        if not path.exists():
            raise ValueError(f"there is no file {path}")
        try:
            kept, entries, pieces = _read(path)
        except (*_DAMAGE, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged, or no file of a PrefixStore: {error}") from error
        if not entries:
            return store
        _check_same(wanted._replace(**kept), wanted)
        store._like = wanted
        for key, entry in entries.items():
            store._pieces.add(pieces, entry.arrays)
            store._entries[key] = entry
            store._lengths[entry.length] += 1
        while store.nbytes > store.max_bytes:
            store._remove(next(iter(store._entries)))
        return store

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._pieces.drop(entry.arrays)
        self._lengths[entry.length] -= 1
        if not self._lengths[entry.length]:
            del self._lengths[entry.length]


def _check_cache(name: str, got: Any) -> None:
    check_instance(name, got, LanguageModelCache, "the cache of a LanguageModel")


def _like(cache: LanguageModelCache) -> _Like:
    leaves, structure = jax.tree.flatten(cache)
    shapes = [(x.shape, x.dtype.name) for x in leaves]
    return _Like(structure, shapes, [_place(x) for x in leaves])


def _place(array: Array) -> Any:
    """The sharding of an array that has been placed; None where JAX chose it.

    Those would have programs compiled once more.
    """
    usual = next(iter(array.devices())).default_memory().kind
    chosen = array.committed or array.sharding.memory_kind != usual
    return array.sharding if chosen else None


def _read(
    path: Path,
) -> tuple[dict[str, Any], dict[bytes, _Entry], dict[bytes, np.ndarray]]:
    """What the caches of a file are like, the caches, and their pieces."""
    with path.open("rb") as opened, np.load(opened) as file:  # which leaves damaged ones open
        index = json.loads(file["index"].tobytes())
        pieces = {
            bytes.fromhex(d): file[d].view(jnp.dtype(dtype)).reshape(shape)
            for d, (dtype, shape) in index["pieces"].items()
        }
    entries = {}
    for key, length, arrays in index["entries"]:
        splits = [Split(axis, tuple(map(bytes.fromhex, d))) for axis, d in arrays]
        if lost := {d for split in splits for d in split.digests} - pieces.keys():
            raise KeyError(f"{len(lost)} pieces are missing")
        entries[bytes.fromhex(key)] = _Entry(length, splits)
    shapes = [(tuple(shape), dtype) for shape, dtype in index["shapes"] or ()]
    return dict(structure=index["structure"], shapes=shapes), entries, pieces


def _check_same(got: _Like, wanted: _Like) -> None:
    if got.shapes != wanted.shapes or str(got.structure) != str(wanted.structure):
        raise ValueError(
            "all caches of a store must be made alike: this one differs from those before in its "
            "layers, options or max_length"
        )


def _longest_segment(model: LanguageModel) -> int:
    found = segmentations(model)
    return max(
        (part.max if isinstance(part, Adaptive) else part.size for part in found), default=256
    )
