"""Finds text files, splits them into training and held-out ones, and reads their documents."""

import fnmatch
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_CHUNK = 1 << 24  # bytes of a .jsonl file scanned at once


def stable_fraction(key: str) -> float:
    """Returns a hash of ``key`` in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha1(key.encode()).digest()[:6], "big") / 2**48


def find_files(patterns: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[Path]:
    """Returns the sorted absolute paths of all files that match ``patterns``.

    Args:
      patterns: folders (searched recursively, without following links to folders), files, or
        globs, in which ``**`` matches any folders. Skips hidden files and folders unless named.
      exclude: fnmatch patterns of full paths with forward slashes to skip, such as ``*/tests/*``.

    Raises:
      ValueError: if a path does not exist, or no file remains.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    found: set[Path] = set()
    remarks = []
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if os.path.isdir(path):
            new, remark = list(_walk(path)), "is an empty folder"
        elif os.path.isfile(path):
            new, remark = [path], ""
        elif glob.has_magic(path):
            new = [match for match in glob.iglob(path, recursive=True) if os.path.isfile(match)]
            remark = "matches no file"
        else:
            raise ValueError(f"expected a folder, a file or a glob, got {pattern!r}: not found")
        if not new:
            remarks.append(f"{pattern!r} {remark}")
        found.update(Path(os.path.abspath(file)) for file in new)
    if not found:
        raise ValueError(f"found no files: {'; '.join(remarks) or 'no patterns were given'}")
    kept = [p for p in found if not any(fnmatch.fnmatchcase(p.as_posix(), e) for e in exclude)]
    if not kept:
        raise ValueError(f"all {len(found)} files of {patterns} are excluded by {exclude}")
    return sorted(kept, key=Path.as_posix)


def _walk(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [os.path.join(root, name) for name in names if not name.startswith(".")]
        yield from filter(os.path.isfile, paths)


def split_files(
    files: Sequence[Path], heldout_fraction: float, heldout_patterns: str | Sequence[str] = ()
) -> tuple[list[Path], list[Path]]:
    """Splits ``files`` into those to train on and those held out.

    Without patterns, the split hashes each file's path relative to the common folder, so that a
    tree is split in the same way wherever it is. Each side gets at least one file.

    Args:
      files: paths as ``find_files`` returns them.
      heldout_fraction: the fraction to hold out, in (0, 1); ignored if there are patterns.
      heldout_patterns: the files to hold out, as for ``find_files``.

    Returns:
      The training files and the held-out files, each in the order of their paths.

    Raises:
      ValueError: if no file remains to train on, or the fraction is out of range.
    """
    files = [Path(os.path.abspath(file)) for file in files]
    if heldout_patterns:
        heldout = find_files(heldout_patterns)
        train = sorted(set(files) - set(heldout), key=Path.as_posix)
        if not train:
            raise ValueError(f"all {len(files)} files are held out by {heldout_patterns}")
        return train, heldout
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must be in (0, 1), got {heldout_fraction}")
    if len(files) < 2:
        raise ValueError(
            f"cannot split {len(files)} file(s) by file: name held-out files with heldout_patterns"
        )
    common = os.path.commonpath([file.parent for file in files])
    place = {file: stable_fraction(file.relative_to(common).as_posix()) for file in files}
    by_place = sorted(files, key=lambda file: (place[file], file.as_posix()))
    # By threshold, not by rank: files added later do not move the others.
    count = sum(value < heldout_fraction for value in place.values())
    count = min(max(count, 1), len(files) - 1)
    return sorted(by_place[count:], key=Path.as_posix), sorted(by_place[:count], key=Path.as_posix)


class Records:
    """Random access to the documents of files; a record is a list of documents.

    A record is a line of a ``.jsonl`` file, a row group of a ``.parquet`` file, or the whole of any
    other file, read as text. Skips empty files, blank lines and empty or null texts. Memory holds
    only positions, 8 bytes per ``.jsonl`` line. A record is read and tokenized as a whole, so split
    texts of gigabytes into several files.

    Example:
      >>> records = Records(find_files("corpus"))  # doctest: +SKIP
      >>> records[0]  # doctest: +SKIP
      [b'The first document.']
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]], *, text_field: str = "text"):
        """Indexes the files.

        Args:
          files: paths, as ``find_files`` returns them.
          text_field: the field or column of ``.jsonl`` and ``.parquet`` files that holds the text.

        Raises:
          ValueError: if no file holds a record, or a ``.parquet`` file lacks the column.
          ImportError: if there are ``.parquet`` files but no ``pyarrow``.
        """
        self._text_field = text_field
        self._files: list[Path] = []
        self._line_starts: dict[int, np.ndarray] = {}  # by the place of the file in _files
        counts = []
        for file in map(Path, files):
            suffix = file.suffix.lower()
            if suffix == ".jsonl":
                starts = _line_starts(file)
                self._line_starts[len(self._files)] = starts
                counts.append(len(starts))
            elif suffix == ".parquet":
                counts.append(_num_row_groups(file, text_field))
            else:
                counts.append(int(file.stat().st_size > 0))
            self._files.append(file)
        self._ends = np.cumsum(counts, dtype=np.int64)
        if not len(self):
            raise ValueError(f"expected files with text, got {len(self._files)} file(s), all empty")

    def __len__(self) -> int:
        """Returns the number of records."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> list[bytes]:
        """Returns the documents of record ``index`` as raw bytes, in order."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        place = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[place - 1]) if place else 0)
        file, suffix = self._files[place], self._files[place].suffix.lower()
        if suffix == ".jsonl":
            texts = [_read_line(file, int(self._line_starts[place][within]), self._text_field)]
        elif suffix == ".parquet":
            texts = _read_row_group(file, within, self._text_field)
        else:
            texts = [file.read_bytes()]
        return [text for text in texts if text]


def _line_starts(file: Path) -> np.ndarray:
    """Returns the byte offsets of all lines of ``file`` that are not empty."""
    ends = [np.array([-1])]
    size = file.stat().st_size
    with file.open("rb") as f:
        for start in range(0, size, _CHUNK):
            ends.append(np.flatnonzero(np.fromfile(f, np.uint8, _CHUNK) == ord("\n")) + start)
    starts = np.concatenate(ends) + 1
    return starts[np.diff(starts, append=size + 1) > 1]


def _read_line(file: Path, start: int, text_field: str) -> bytes:
    with file.open("rb") as f:
        f.seek(start)
        line = f.readline()
    if not line.strip():
        return b""
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or text_field not in record:
            raise ValueError(f"expected an object with the field {text_field!r}")
        return _to_bytes(record[text_field])
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError among them
        with file.open("rb") as f:
            number = next(n for n, _ in enumerate(f, start=1) if f.tell() > start)
        raise ValueError(f"{file}, line {number}: {e}; got {line[:80]!r}") from e


def _to_bytes(text: Any) -> bytes:
    if text is None or isinstance(text, bytes):
        return text or b""
    if isinstance(text, str):
        return text.encode("utf-8", errors="replace")  # JSON can hold lone surrogates
    raise ValueError(f"expected text, got a {type(text).__name__}")


def _open_parquet(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise ImportError(f"reading {file} needs pyarrow: pip install 'memcache_jax[data]'") from e
    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as e:
        raise ValueError(f"{file} is not a Parquet file: {e}") from e


def _num_row_groups(file: Path, text_field: str) -> int:
    with _open_parquet(file) as parquet:
        columns = parquet.schema_arrow.names
        if text_field not in columns:
            raise ValueError(
                f"{file} has no column {text_field!r}: it has {', '.join(columns)}; set text_field"
            )
        return parquet.num_row_groups


def _read_row_group(file: Path, group: int, text_field: str) -> list[bytes]:
    with _open_parquet(file) as parquet:
        column = parquet.read_row_group(group, columns=[text_field]).column(text_field)
    try:
        return [_to_bytes(text) for text in column.to_pylist()]
    except ValueError as e:
        raise ValueError(f"{file}, column {text_field!r}: {e}") from e
