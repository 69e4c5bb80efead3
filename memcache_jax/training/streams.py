"""Batches of several streams; a process reads only the streams of its devices' rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from memcache_jax.sharding import batch_sharding
from memcache_jax.training.data import training_iterator
from memcache_jax.training.distributed import gather
from memcache_jax.training.records import Records
from memcache_jax.training.tokenizers import Tokenizer


class Streams:
    """An endless iterator over batches with equally many rows of every stream.

    With S streams and B rows, stream s fills the rows [s B / S, (s + 1) B / S) of every batch. A
    stream does not depend on which other streams a process reads, and ``get_state`` returns the
    positions of all streams, so that any number of processes can resume from it.

    Args:
      records: as for ``training_iterator``, and so are the others that are not listed.
      batch_size: rows per batch, a multiple of ``num_streams``.
      read: the streams to read, as from ``streams_here``; all by default.
      shuffle_window: number of rows shuffled together, over all streams.

    Raises:
      ValueError: as ``training_iterator``; or if the number of streams does not divide the batch.

    Example:
      >>> records = Records(find_files("corpus"))  # doctest: +SKIP
      >>> batches = Streams(  # doctest: +SKIP
      ...     records, ByteTokenizer(), sequence_length=1024, batch_size=8, seed=0, num_streams=4
      ... )
      >>> next(batches).shape  # doctest: +SKIP
      (8, 1025)
    """

    def __init__(
        self,
        records: Records,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        num_streams: int = 1,
        read: Sequence[int] | None = None,
        shuffle_window: int = 1024,
    ) -> None:
        if num_streams < 1 or batch_size % num_streams:
            raise ValueError(
                "batch_size must be a multiple of the number of streams, data.streams, got "
                f"{batch_size} and {num_streams}"
            )
        self.num_streams = num_streams
        self._shape = batch_size, sequence_length + 1
        self._iterators = {
            index: training_iterator(
                records,
                tokenizer,
                sequence_length=sequence_length,
                batch_size=batch_size // num_streams,
                seed=seed,
                stream_index=index,
                num_streams=num_streams,
                shuffle_window=max(shuffle_window // num_streams, 1),
            )
            for index in (range(num_streams) if read is None else read)
        }

    def __iter__(self) -> "Streams":
        """Returns itself."""
        return self

    def __next__(self) -> np.ndarray:
        """Returns tokens (b, t + 1) int32, with -1 in the rows of streams that it does not read."""
        tokens = np.full(self._shape, -1, np.int32)
        by_stream = tokens.reshape(self.num_streams, -1, tokens.shape[1])
        for index, iterator in self._iterators.items():
            by_stream[index] = next(iterator)["tokens"]
        return tokens

    def get_state(self) -> list[dict[str, Any]]:
        """Returns the positions in all streams, as JSON types. All processes must call it together.

        Raises:
          ValueError: if no process reads one of the streams.
        """
        own = [(index, iterator.get_state()) for index, iterator in self._iterators.items()]
        states = dict(pair for pairs in gather(own) for pair in pairs)
        if unread := sorted(set(range(self.num_streams)) - set(states)):
            raise ValueError(f"no process reads {unread} of the {self.num_streams} streams")
        return [states[index] for index in range(self.num_streams)]

    def set_state(self, states: Sequence[dict[str, Any]] | dict[str, Any]) -> None:
        """Moves the streams to these positions; the next batch continues from there.

        Args:
          states: as ``get_state`` returned them, or the state of ``training_iterator`` alone, for a
            single stream.

        Raises:
          ValueError: if their number is not that of the streams.
        """
        states = [states] if isinstance(states, Mapping) else states
        if len(states) != self.num_streams:
            raise ValueError(f"expected positions in {self.num_streams} streams, got {len(states)}")
        for index, iterator in self._iterators.items():
            iterator.set_state(states[index])


def streams_here(mesh: Mesh | None, batch_size: int, num_streams: int) -> list[int]:
    """Returns the streams whose rows this process's devices hold; ``mesh`` divides the rows."""
    if mesh is None:
        return list(range(num_streams))
    here = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = np.concatenate([np.arange(batch_size)[index] for index in here.values()])
    return np.unique(rows * num_streams // batch_size).tolist()
