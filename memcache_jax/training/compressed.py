"""Compressed files, read as the text that they hold."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 1 << 20
_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_COMPRESSED = (*_OPEN, ".zst")
_ARCHIVES = (".7z", ".rar", ".tar", ".tbz2", ".tgz", ".txz", ".zip")
_REFUSED = (*_ARCHIVES, ".br", ".lz", ".lz4", ".lzo", ".z")


def is_compressed(file: Path) -> bool:
    """Whether ``unpacked`` reads a file as another one."""
    return file.suffix.lower() in _COMPRESSED


def kind(file: Path) -> str:
    """Returns what a file holds: ``".jsonl"``, ``".parquet"``, or ``""`` for plain text.

    Raises:
      ValueError: for archives, compressions that are not read, and compressed Parquet.

    Example:
      >>> from pathlib import Path
      >>> kind(Path("a.jsonl.gz"))
      '.jsonl'
    """
    inner = Path(file.stem) if is_compressed(file) else file
    suffix = inner.suffix.lower()
    if suffix in _REFUSED or (suffix == ".parquet" and inner != file):
        raise ValueError(
            f"{file} cannot be read: unpack it, or leave it out with data.exclude; only text and "
            f".jsonl may be compressed, as {', '.join(_COMPRESSED)}"
        )
    return suffix if suffix in (".jsonl", ".parquet") else ""


def unpacked(file: Path) -> Iterator[bytes]:
    """Yields the bytes of a compressed file, unpacked, chunk by chunk.

    Raises:
      ValueError: if it is damaged, or is ``.zst`` without the package ``zstandard``.
    """
    if file.suffix.lower() == ".zst":
        yield from _unpacked_zstd(file)
        return
    try:
        with _OPEN[file.suffix.lower()](file, "rb") as f:
            while chunk := f.read(_CHUNK):
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # of the disk, not of the contents
            raise
        raise ValueError(f"{file} is damaged: {e}") from e


def _unpacked_zstd(file: Path) -> Iterator[bytes]:
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ValueError(
            f"reading {file} needs the package zstandard: pip install zstandard"
        ) from e
    frame = None
    with file.open("rb") as f:
        while chunk := f.read(_CHUNK):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as e:
                    raise ValueError(f"{file} is damaged: {e}") from e
                chunk = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        raise ValueError(f"{file} is damaged: it ends within a frame")
