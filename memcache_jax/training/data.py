"""Token rows: a resumable Grain pipeline for training, fixed rows for evaluation."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import grain
import grain.experimental
import numpy as np

from memcache_jax.training.files import stable_fraction
from memcache_jax.training.records import Records
from memcache_jax.training.tokenizers import Tokenizer


class HeldOut(NamedTuple):
    """Rows to evaluate a model on.

    Attributes:
      tokens: (rows, sequence_length + 1) int32. Inputs are ``[:, :-1]`` and targets ``[:, 1:]``;
        neighboring rows overlap by one token, so that no target appears twice.
      bytes_per_token: bytes of text per target, including end tokens. A document that is cut off
        counts by its share of tokens. Bits per byte are the mean loss in nats / ln 2 /
        bytes_per_token.
    """

    tokens: np.ndarray
    bytes_per_token: float


def training_iterator(
    records: Records,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    stream_index: int = 0,
    num_streams: int = 1,
    shuffle_window: int = 1024,
) -> grain.DatasetIterator:
    """Returns an endless iterator over shuffled, packed batches.

    Each epoch shuffles the records and deals them out to the streams. The end token follows each
    document, the result is cut into rows without padding, and rows are shuffled within windows.
    ``get_state`` returns a small dict of JSON types. An iterator made with the same arguments
    continues with the next batch after ``set_state`` of it.

    Args:
      records: the documents to train on.
      tokenizer: turns them into ids.
      sequence_length: tokens predicted per row; a row has one more.
      batch_size: rows per batch of this stream.
      seed: of the shuffles.
      stream_index: index of this stream.
      num_streams: number of streams that share the records.
      shuffle_window: number of rows shuffled together; 1 keeps a document's rows in order.

    Returns:
      An iterator over ``{"tokens": (batch_size, sequence_length + 1) int32}``.

    Raises:
      ValueError: if there are fewer records than streams, or the records have no text.

    Example:
      >>> records = Records(find_files("corpus"))  # doctest: +SKIP
      >>> batches = training_iterator(  # doctest: +SKIP
      ...     records, ByteTokenizer(), sequence_length=1024, batch_size=8, seed=0
      ... )
    """
    if sequence_length < 1 or batch_size < 1 or not 0 <= seed < 2**32:
        raise ValueError(
            "sequence_length and batch_size must be positive and seed in [0, 2**32), got "
            f"{sequence_length=}, {batch_size=}, {seed=}"
        )
    if not 0 <= stream_index < num_streams:
        raise ValueError(f"stream_index must be in [0, {num_streams}), got {stream_index}")
    if len(records) < num_streams:
        raise ValueError(
            f"{num_streams} streams need at least {num_streams} records, got {len(records)}: give "
            "fewer streams (data.streams), more files, or files with more lines or row groups"
        )
    # Otherwise Grain would search forever for a first token.
    if not any(records[i] for i in range(len(records))):
        raise ValueError(f"expected records with text, got {len(records)} without any")
    dataset = (
        grain.MapDataset.source(records)
        .seed(seed)
        .shuffle()[stream_index::num_streams]
        .map(_tokenize_with(tokenizer))
        .repeat()
        # Prefetch threads would be slower: they hold Python's lock most of the time.
        .to_iter_dataset(grain.ReadOptions(num_threads=0))
    )
    dataset = grain.experimental.ConcatThenSplitIterDataset(
        dataset, length_struct={"tokens": sequence_length + 1}
    )
    # Neighboring rows are often of one document; a batch should mix documents.
    rows = grain.experimental.WindowShuffleIterDataset(
        _PackedTokens(dataset), window_size=shuffle_window, seed=seed
    )
    return iter(rows.batch(batch_size, drop_remainder=True))


def _tokenize_with(tokenizer: Tokenizer) -> Callable[[Iterable[bytes]], dict[str, np.ndarray]]:
    end = np.array([tokenizer.eos_id], np.int32)

    def tokenize(documents: Iterable[bytes]) -> dict[str, np.ndarray]:
        parts = [part for text in documents for part in (tokenizer.encode(text), end)]
        return {"tokens": np.concatenate(parts) if parts else end[:0]}

    return tokenize


class _PackedTokens(grain.IterDataset):
    """Keeps only the tokens of packed rows, and fixes the packer's restored state."""

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedTokensIterator(iter(self._parent))


class _PackedTokensIterator(grain.DatasetIterator):
    def __next__(self) -> dict[str, np.ndarray]:
        return {"tokens": next(self._parent)["tokens"]}

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        # JSON turns tuples into lists, but Grain 0.2.18 compares with the tuple (-1, -1). With a
        # list it drops a document whenever a row ends at the end of one.
        slices = {key: tuple(value) for key, value in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": slices})


def heldout_rows(
    records: Records, tokenizer: Tokenizer, *, sequence_length: int, max_tokens: int
) -> HeldOut:
    """Returns fixed rows of held-out text, at most ``max_tokens`` targets.

    Documents are in the order of the files, each followed by the end token. If they have more than
    ``max_tokens``, records are taken in a hashed order instead, which covers all files. An
    incomplete last row is dropped.

    Raises:
      ValueError: if there are too few tokens for one row, or ``max_tokens`` is below one row.
    """
    if not 1 <= sequence_length <= max_tokens:
        raise ValueError(
            "sequence_length must be positive and at most max_tokens, got "
            f"{sequence_length=}, {max_tokens=}"
        )
    indices = range(len(records))
    tokens, num_bytes, complete = _read(records, indices, tokenizer, max_tokens)
    if not complete:
        spread = sorted(indices, key=lambda i: stable_fraction(str(i)))
        tokens, num_bytes, _ = _read(records, spread, tokenizer, max_tokens)
    if len(tokens) < sequence_length + 1:
        raise ValueError(
            f"the held-out text has {len(tokens)} tokens, but one row needs {sequence_length + 1}: "
            "hold out more, or shorten sequence_length"
        )
    rows = min(len(tokens) - 1, max_tokens) // sequence_length
    starts = np.arange(rows)[:, None] * sequence_length
    targets = slice(1, rows * sequence_length + 1)
    return HeldOut(
        tokens[starts + np.arange(sequence_length + 1)], float(num_bytes[targets].mean())
    )


def _read(
    records: Records, indices: Iterable[int], tokenizer: Tokenizer, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Returns the tokens of whole records, the bytes per token, and whether all were read."""
    end = np.array([tokenizer.eos_id], np.int32)
    tokens, num_bytes = [np.empty(0, np.int32)], [np.empty(0)]
    num_tokens = 0
    for index in indices:
        if num_tokens > max_tokens:  # the first token is not a target
            return np.concatenate(tokens), np.concatenate(num_bytes), False
        for text in records[index]:
            ids = tokenizer.encode(text)
            tokens += [ids, end]
            num_bytes += [np.full(len(ids), len(text) / max(len(ids), 1)), np.zeros(1)]
            num_tokens += len(ids) + 1
    return np.concatenate(tokens), np.concatenate(num_bytes), True
