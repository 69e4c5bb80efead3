"""Files that survive a kill and reveal damage: replaced in one step, checked by digests."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DIGESTS_FILE = "digests.json"


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one step, so that a kill leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    new.replace(path)


def read_json(path: Path) -> Any:
    """Returns what a file holds, or raises ValueError that names it."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged, or no JSON: {e}") from e


def write_digests(folder: Path) -> int:
    """Writes ``folder/digests.json``, the SHA-256 of each file below; returns their bytes."""
    files = list(_files(folder))
    found = {file.relative_to(folder).as_posix(): _sha256(file) for file in files}
    # Without a space or a line break, so that no bit of it can change unnoticed.
    replace_file(folder / DIGESTS_FILE, json.dumps(found, separators=(",", ":")))
    return sum(file.stat().st_size for file in files)


def check_digests(
    folder: Path, *, only: tuple[str, ...] = ("",), share: tuple[int, int] = (0, 1)
) -> int | None:
    """Compares files with the digests in ``folder/digests.json``.

    Args:
      folder: as for ``write_digests``.
      only: beginnings of the names to check, all by default; a name is a path below the folder.
      share: (i, n) checks every n-th of these files, from the i-th on.

    Returns:
      How many files were checked; None if the folder has no digests.

    Raises:
      ValueError: if a file is missing or changed.
    """
    if not (folder / DIGESTS_FILE).exists():
        return None
    listed = read_json(folder / DIGESTS_FILE)
    if not isinstance(listed, dict):
        raise ValueError(f"{folder / DIGESTS_FILE} is damaged: it holds no digests")
    index, count = share
    names = [name for name in sorted(listed) if name.startswith(only)][index::count]
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if _sha256(folder / name) != listed[name]:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not that in the digests")
    return len(names)


def digest_of_all(files: Iterable[Path]) -> str:
    """Returns a digest of the files' names and all their bytes, 2 to 3 s per 2 GB on one core.

    Several files are read side by side.
    """
    files = list(files)
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1) or 1) as pool:
        found = zip(files, pool.map(_sha256, files), strict=True)
        lines = [f"{file.name}\0{digest}\n" for file, digest in found]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / DIGESTS_FILE:
            yield path


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
