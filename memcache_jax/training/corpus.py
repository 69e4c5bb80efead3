"""The text of a run: tokenizer, training records, held-out rows, and a fingerprint of the files."""

import functools
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memcache_jax.training.compressed import is_compressed
from memcache_jax.training.config import Config
from memcache_jax.training.data import HeldOut, heldout_rows
from memcache_jax.training.files import find_files, split_files
from memcache_jax.training.records import Records
from memcache_jax.training.tokenizers import Tokenizer, make_tokenizer

_log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """The text of a run.

    ``identity`` has the numbers of files and bytes, and a digest of every file's name, size, and
    first and last 4 KiB. It detects other or changed files, except an edit in the middle of a file
    that keeps its size.
    """

    tokenizer: Tokenizer
    train: Records
    heldout: HeldOut
    identity: dict[str, Any]
    heldout_skipped: tuple[str, ...] = ()

    @property
    def skipped(self) -> list[str]:
        """The lines that were read so far and skipped, as ``file:line: reason``."""
        return list(dict.fromkeys([*self.heldout_skipped, *self.train.skipped.values()]))


def load_corpus(config: Config) -> Corpus:
    """Finds, splits and indexes the files in ``config.data``.

    Raises:
      ValueError: if there are no files, if they hold too little text, or if the tokenizer does not
        fit the model.
    """
    options = config.data
    for key in ("files", "exclude", "heldout_files"):
        if not all(isinstance(name, str) for name in _as_list(options[key])):
            raise ValueError(
                f"data.{key} must be names, got {options[key]!r}: quote names that are numbers, "
                "as in --config.data.files=\"('2024',)\""
            )
    if not options.files:
        raise ValueError("data.files names no files: set --config.data.files=FOLDER, FILE or GLOB")
    tokenizer = make_tokenizer(
        options.tokenizer, eos_token=options.eos_token, vocab_size=config.model.vocab_size
    )
    files = find_files(options.files, options.exclude)
    read = functools.partial(
        Records,
        text_field=options.text_field,
        skip_bad_lines=options.get("skip_bad_lines", False),
    )
    if len(files) == 1 and not options.heldout_files:
        train, heldout = files, []
        records, held = read(files).split(options.heldout_fraction)
    else:
        train, heldout = split_files(files, options.heldout_fraction, options.heldout_files)
        records, held = read(train), read(heldout)
    rows = heldout_rows(
        held,
        tokenizer,
        sequence_length=config.sequence_length,
        max_tokens=options.heldout_tokens,
    )
    num_bytes = sum(file.stat().st_size for file in train)
    _log.info(
        "Data: %d files to train on (%.1f MB), %s held out (%d tokens evaluated).",
        *(len(train), num_bytes / 1e6, len(heldout) or "a part of it", rows.tokens[:, 1:].size),
    )
    lines = held.lines | records.lines
    names = _names([*train, *heldout])
    identity = {
        "train_files": len(train),
        "heldout_files": len(heldout),
        "train_bytes": num_bytes,
        "files": digest_of(names),
        "heldout": hashlib.sha1(rows.tokens.tobytes()).hexdigest(),
        "compressed": sum(map(is_compressed, [*train, *heldout])),
        # What may be mended: texts of lines, while the same lines are records.
        "lines": {
            name: [lines[file], digest_of({name: file})]
            for name, file in names.items()
            if file in lines
        },
        "others": digest_of({name: file for name, file in names.items() if file not in lines}),
        "tokenizer": "bytes"
        if options.tokenizer == "bytes"
        else hashlib.sha1(Path(options.tokenizer).read_bytes()).hexdigest(),
    }
    return Corpus(tokenizer, records, rows, identity, tuple(held.skipped.values()))


def _as_list(names: Any) -> list[Any]:
    return list(names) if isinstance(names, list | tuple) else [names]


def _names(files: Sequence[Path]) -> dict[str, Path]:
    """Returns the files by their names below the folder of all."""
    common = os.path.commonpath([file.parent for file in files])
    return {file.relative_to(common).as_posix(): file for file in files}


def digest_of(files: Mapping[str, Path], ends: int = 4096) -> str:
    """Returns a digest of the files' names, sizes, and first and last bytes."""
    digest = hashlib.sha1()
    for name, file in files.items():
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as f:
            digest.update(f.read(ends))
            f.seek(max(size - ends, 0))
            digest.update(f.read(ends))
    return digest.hexdigest()


def mended_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str] | None:
    """Returns the names of the files whose lines were mended; None if the data is another.

    It is the same data if the files have the same names and as many lines that are not empty, so
    that the place in them means the same, and if the held-out rows and all other files are the
    same.

    Args:
      before: the ``identity`` of the corpus of a run.
      now: that of the corpus with which it is to go on.
    """
    if before.get("compressed", 0) != now["compressed"]:  # earlier versions read packed bytes
        return None
    if before == {name: now.get(name) for name in before}:  # earlier versions had fewer
        return []
    lines, found = before.get("lines"), now["lines"]
    same = ("train_files", "heldout_files", "heldout", "others", "tokenizer")
    if (
        lines is None
        or any(before[name] != now[name] for name in same)
        or {name: count for name, (count, _) in lines.items()}
        != {name: count for name, (count, _) in found.items()}
    ):
        return None
    return [name for name in lines if list(lines[name]) != list(found[name])]


class ReadingTroubles:
    """Warns about documents that were not UTF-8, and about skipped lines, when there are more."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self.replaced = self.skipped = 0

    def tell(self) -> None:
        """Logs the counts that have grown, with the names of the lines."""
        count = getattr(self._corpus.tokenizer, "num_replaced_documents", 0)
        if count > self.replaced:
            self.replaced = count
            _log.warning(
                "%d documents read by this process were not UTF-8; "
                "their invalid bytes were replaced.",
                self.replaced,
            )
        lines = list(self._corpus.skipped)
        if new := lines[self.skipped :]:
            self.skipped = len(lines)
            _log.warning(
                "%d lines read by this process were skipped, since they hold no text "
                "(data.skip_bad_lines): %s%s",
                *(len(lines), "; ".join(new[:20]), "; ..." if len(new) > 20 else ""),
            )
