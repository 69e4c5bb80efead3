"""The documents of files, by number: lines, rows of tables, or whole texts."""

import contextlib
import copy
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from memcache_jax._checks import shown
from memcache_jax.training.compressed import is_compressed, kind, unpacked
from memcache_jax.training.parquet import read_row_group, rows_of_groups

_log = logging.getLogger(__name__)

_CHUNK = 1 << 24  # bytes of a .jsonl file scanned at once


class _Lines(NamedTuple):
    """The lines of a file: where the first one begins, and all that are not empty."""

    begin: int
    starts: np.ndarray


class _Part(NamedTuple):
    """A part of the documents of one file.

    Attributes:
      first: number of the first document of each record.
      kept: of each document, whether it is in the part; of a single one, both parts have a share.
      share: where a single one is cut, and whether the part has what follows.
    """

    first: np.ndarray
    kept: np.ndarray
    share: tuple[float, bool] | None


class _Unpacked:
    """A temporary file that goes with the last of its users, who take turns."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """The file for one user: its position is shared."""
        with self._turn:
            yield self.file

    def __del__(self) -> None:
        self.file.close()


class Records:
    """Random access to the documents of files; a record is a list of documents.

    A record is a line of a ``.jsonl`` file, a row group of a ``.parquet`` file, or the whole of any
    other file, read as text. Text and ``.jsonl`` may be compressed (``compressed.py``); compressed
    lines are unpacked into a temporary file, which goes with the process. Skips empty files, blank
    lines and empty or null texts. Memory holds only positions, 8 bytes per ``.jsonl`` line. A
    record is read and tokenized as a whole, so split texts of gigabytes into several files.

    Attributes:
      skipped: lines that were read and skipped so far, as ``file:line: reason``, by their records.

    Example:
      >>> records = Records(find_files("corpus"))  # doctest: +SKIP
      >>> records[0]  # doctest: +SKIP
      [b'The first document.']
    """

    def __init__(
        self,
        files: Iterable[str | os.PathLike[str]],
        *,
        text_field: str = "text",
        skip_bad_lines: bool = False,
    ):
        """Indexes the files.

        Args:
          files: paths, as ``find_files`` returns them.
          text_field: the field or column of ``.jsonl`` and ``.parquet`` files that holds the text.
          skip_bad_lines: read lines of ``.jsonl`` files that have no such text as blank ones.

        Raises:
          ValueError: if no file holds a record, a ``.parquet`` file lacks the column, or a file
            cannot be unpacked.
          ImportError: if there are ``.parquet`` files but no ``pyarrow``.
        """
        self._text_field, self._skip_bad_lines = text_field, skip_bad_lines
        self._files: list[Path] = []
        self._lines: dict[int, _Lines] = {}  # by the place of the file in _files
        self._unpacked: _Unpacked | None = None
        self._part: _Part | None = None
        self.skipped: dict[int, str] = {}
        counts = []
        for file in map(Path, files):
            of_kind = kind(file)
            if of_kind == ".jsonl":
                lines = self._lines[len(self._files)] = self._index(file)
                counts.append(len(lines.starts))
            elif of_kind == ".parquet":
                counts.append(len(rows_of_groups(file, text_field)))
            else:
                counts.append(int(file.stat().st_size > 0))
            self._files.append(file)
        self._ends = np.cumsum(counts, dtype=np.int64)
        if not len(self):
            raise ValueError(f"expected files with text, got {len(self._files)} file(s), all empty")

    @property
    def lines(self) -> dict[Path, int]:
        """How many lines are records, of each ``.jsonl`` file."""
        return {self._files[place]: len(lines.starts) for place, lines in self._lines.items()}

    def split(self, fraction: float) -> tuple["Records", "Records"]:
        """Splits the documents of a single file into those to train on and those held out.

        Which are held out is a hash of their numbers, so that documents that are added later move
        no others. A document that is alone is cut: the end is held out, from a line's beginning if
        there is one.

        Args:
          fraction: the fraction to hold out, in (0, 1).

        Raises:
          ValueError: if there are several files, or the fraction is out of range.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"heldout_fraction must be in (0, 1), got {fraction}")
        if len(self._files) != 1:
            raise ValueError(f"expected a single file to split, got {len(self._files)}")
        counts = np.ones(len(self), np.int64)
        if kind(self._files[0]) == ".parquet":
            counts = np.array(rows_of_groups(self._files[0], self._text_field))
        first, total = np.cumsum(counts) - counts, int(counts.sum())
        place = _hashed(total)
        heldout = (place < fraction) | (place == place.min())
        if heldout.all():
            heldout = place < place.max()
        parts = []
        for kept, is_heldout in ((~heldout, False), (heldout, True)):
            part = copy.copy(self)
            part._part = _Part(first, kept, None)
            if total == 1:
                part._part = _Part(first, np.array([True]), (1 - fraction, is_heldout))
            parts.append(part)
        return parts[0], parts[1]

    def __len__(self) -> int:
        """Returns the number of records."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> list[bytes]:
        """Returns the documents of record ``index`` as raw bytes, in order."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        if self._part is None:
            return [text for text in self._read(index) if text]
        first, kept, share = self._part
        end = first[index + 1] if index + 1 < len(first) else len(kept)
        kept = kept[first[index] : end]
        if not kept.any():
            return []
        texts = [text for text, keep in zip(self._read(index), kept, strict=True) if keep]
        if share is not None:
            texts = [_share(text, *share) for text in texts]
        return [text for text in texts if text]

    def _read(self, index: int) -> list[bytes]:
        place = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[place - 1]) if place else 0)
        file = self._files[place]
        if place in self._lines:
            return [self._read_line(index, file, self._lines[place], within)]
        if kind(file) == ".parquet":
            values = read_row_group(file, within, self._text_field)
            try:
                return [_to_bytes(value) for value in values]
            except ValueError as e:
                raise ValueError(f"{file}, column {self._text_field!r}: {e}") from e
        return [b"".join(unpacked(file)) if is_compressed(file) else file.read_bytes()]

    def _index(self, file: Path) -> _Lines:
        if not is_compressed(file):
            with file.open("rb") as f:
                return _Lines(0, _line_starts(f, 0, file.stat().st_size))
        # One file for all: a process may open only so many.
        if self._unpacked is None:
            _log.info(
                "Unpacking compressed lines into a temporary file in %s (TMPDIR).",
                tempfile.gettempdir(),
            )
            self._unpacked = _Unpacked()
        packed = self._unpacked.file
        begin = packed.seek(0, os.SEEK_END)
        try:
            for chunk in unpacked(file):
                packed.write(chunk)
            packed.write(b"\n")
            packed.flush()
        except OSError as e:
            where = f"unpacking {file} into {tempfile.gettempdir()} (TMPDIR)"
            raise OSError(e.errno, f"{e.strerror}, {where}") from e
        return _Lines(begin, _line_starts(packed, begin, packed.tell() - begin))

    def _read_line(self, index: int, file: Path, lines: _Lines, within: int) -> bytes:
        if index in self.skipped:
            return b""
        start = int(lines.starts[within])
        packed = self._unpacked if is_compressed(file) else None
        with packed.opened() if packed else file.open("rb") as f:
            f.seek(start)
            line = f.readline()
            try:
                return _text_of(line, self._text_field) if line.strip() else b""
            except (ValueError, RecursionError) as e:  # JSONDecodeError among them
                number = 1 + _count_lines(f, lines.begin, start)
                if not self._skip_bad_lines:
                    raise ValueError(
                        f"{file}, line {number}: {e}; got {line[:80]!r}. Mend the line, or skip "
                        "such lines with data.skip_bad_lines=True; a run goes on from its last "
                        "checkpoint with resume=True"
                    ) from e
                self.skipped[index] = f"{file}:{number}: {e}"
                return b""


def _line_starts(f: IO[bytes], begin: int, size: int) -> np.ndarray:
    """Returns the positions in ``f`` of all lines that are not empty."""
    ends = [np.array([begin - 1])]
    f.seek(begin)
    for at in range(begin, begin + size, _CHUNK):
        chunk = np.fromfile(f, np.uint8, min(_CHUNK, begin + size - at))
        ends.append(np.flatnonzero(chunk == ord("\n")) + at)
    starts = np.concatenate(ends) + 1
    return starts[np.diff(starts, append=begin + size + 1) > 1]


def _count_lines(f: IO[bytes], begin: int, end: int) -> int:
    f.seek(begin)
    return sum(f.read(min(_CHUNK, end - at)).count(b"\n") for at in range(begin, end, _CHUNK))


def _text_of(line: bytes, text_field: str) -> bytes:
    record = json.loads(line)
    if not isinstance(record, dict) or text_field not in record:
        raise ValueError(f"expected an object with the field {text_field!r}")
    return _to_bytes(record[text_field])


def _to_bytes(text: Any) -> bytes:
    if text is None or isinstance(text, bytes):
        return text or b""
    if isinstance(text, str):
        return text.encode("utf-8", errors="replace")  # JSON can hold lone surrogates
    raise ValueError(f"expected text, got {shown(text)}")


def _share(text: bytes, cut: float, after: bool) -> bytes:
    """Returns the text before a cut at a line's beginning, else a word's, or what follows it."""
    place = int(cut * len(text))
    for separator in (b"\n", b" "):
        found = text.find(separator, place, (place + len(text)) // 2) + 1
        if found:
            place = found
            break
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:  # within a character
        place += 1
    return text[place:] if after else text[:place]


def _hashed(count: int) -> np.ndarray:
    """Returns a hash in [0, 1) of each number below ``count``: the finalizer of SplitMix64."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2.0**64
