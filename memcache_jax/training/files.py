"""Finds text files, and splits them into training and held-out ones."""

import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def stable_fraction(key: str) -> float:
    """Returns a hash of ``key`` in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha1(key.encode()).digest()[:6], "big") / 2**48


def find_files(patterns: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[Path]:
    """Returns the sorted absolute paths of all files that match ``patterns``.

    Args:
      patterns: folders (searched recursively, without following links to folders), files, or
        globs, in which ``**`` matches any folders. Skips hidden files and folders unless named.
        A file that has several names, by links, is found once; of a folder of Hugging Face's
        cache, by the names in its snapshots.
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
    return sorted(_once(kept), key=Path.as_posix)


def _once(files: Iterable[Path]) -> list[Path]:
    """Returns one name of each file: with a suffix, and no link, if there is such a one."""
    order = sorted(files, key=lambda file: (not file.suffix, file.is_symlink(), file.as_posix()))
    return list({_real(file): file for file in reversed(order)}.values())


def _real(file: Path) -> object:
    """What all names of a file share."""
    found = file.stat()
    return (found.st_dev, found.st_ino) if found.st_nlink > 1 else os.path.realpath(file)


def _walk(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        if {"blobs", "refs", "snapshots"} <= set(folders):  # a cache's: contents, and links to them
            folders[:], names = ["snapshots"], []
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
        held = set(map(_real, heldout))
        train = sorted((file for file in files if _real(file) not in held), key=Path.as_posix)
        if not train:
            raise ValueError(f"all {len(files)} files are held out by {heldout_patterns}")
        return train, heldout
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must be in (0, 1), got {heldout_fraction}")
    if len(files) < 2:
        raise ValueError(
            f"cannot split {len(files)} file(s) by file: name held-out files with "
            "heldout_patterns, or split its documents with Records.split"
        )
    common = os.path.commonpath([file.parent for file in files])
    place = {file: stable_fraction(file.relative_to(common).as_posix()) for file in files}
    by_place = sorted(files, key=lambda file: (place[file], file.as_posix()))
    # By threshold, not by rank: files added later do not move the others.
    count = sum(value < heldout_fraction for value in place.values())
    count = min(max(count, 1), len(files) - 1)
    return sorted(by_place[count:], key=Path.as_posix), sorted(by_place[:count], key=Path.as_posix)
