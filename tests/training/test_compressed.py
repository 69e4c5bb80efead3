"""Compressed files: what is read, and what is refused by name."""

import bz2
import gzip
import lzma
import sys
from pathlib import Path

import pytest

from memcache_jax.training.compressed import kind, unpacked

TEXT = b"The cat sat on the mat. " * 500


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_unpacked(tmp_path, suffix, pack):
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(pack(TEXT) + pack(TEXT))
    assert b"".join(unpacked(file)) == TEXT + TEXT
    for damaged in (pack(TEXT)[:-9], b"none of it", pack(TEXT)[:20] + bytes(9) + pack(TEXT)[29:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a\.txt\{suffix} is damaged: "):
            list(unpacked(file))


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    file, packed = tmp_path / "a.txt.zst", zstandard.ZstdCompressor().compress(TEXT)
    file.write_bytes(packed + packed)
    assert b"".join(unpacked(file)) == TEXT + TEXT
    for damaged in (packed[:-9], b"none of it"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.txt\.zst is damaged: "):
            list(unpacked(file))


def test_zstandard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.zst").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.zst needs the package zstandard: pip install"):
        list(unpacked(tmp_path / "a.zst"))


@pytest.mark.parametrize(
    ("name", "of_kind"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.JSONL.GZ", ".jsonl"),
        ("a.parquet", ".parquet"),
        ("a.txt.zst", ""),
        ("a.gz", ""),
        ("jsonl", ""),
        ("a.zip.txt", ""),
    ],
)
def test_kind(name, of_kind):
    assert kind(Path("folder.gz", name)) == of_kind


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tgz", "a.parquet.gz", "a.txt.lz4"])
def test_what_is_not_read_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} cannot be read: unpack it, or leave it out"):
        kind(Path("folder", name))
