"""The text of a run: tokenizer, training records, held-out rows, and a fingerprint of the files."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memcache_jax.training.config import Config
from memcache_jax.training.data import HeldOut, heldout_rows
from memcache_jax.training.files import Records, find_files, split_files
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
    train, heldout = split_files(files, options.heldout_fraction, options.heldout_files)
    records = Records(train, text_field=options.text_field)
    rows = heldout_rows(
        Records(heldout, text_field=options.text_field),
        tokenizer,
        sequence_length=config.sequence_length,
        max_tokens=options.heldout_tokens,
    )
    num_bytes = sum(file.stat().st_size for file in train)
    _log.info(
        "Data: %d files to train on (%.1f MB), %d held out (%d tokens evaluated).",
        *(len(train), num_bytes / 1e6, len(heldout), rows.tokens[:, 1:].size),
    )
    identity = {
        "train_files": len(train),
        "heldout_files": len(heldout),
        "train_bytes": num_bytes,
        "files": _digest([*train, *heldout]),
        "tokenizer": "bytes"
        if options.tokenizer == "bytes"
        else hashlib.sha1(Path(options.tokenizer).read_bytes()).hexdigest(),
    }
    return Corpus(tokenizer, records, rows, identity)


def _as_list(names: Any) -> list[Any]:
    return list(names) if isinstance(names, list | tuple) else [names]


def _digest(files: Sequence[Path], ends: int = 4096) -> str:
    """Returns a digest of the files' names, sizes, and first and last bytes."""
    common = os.path.commonpath([file.parent for file in files])
    digest = hashlib.sha1()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(common).as_posix()}\0{size}\0".encode())
        with file.open("rb") as f:
            digest.update(f.read(ends))
            f.seek(max(size - ends, 0))
            digest.update(f.read(ends))
    return digest.hexdigest()


class ReplacedDocuments:
    """Warns about documents that were not UTF-8, whenever their number has grown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.count = 0

    def tell(self) -> None:
        """Logs the count if it has grown."""
        count = getattr(self._tokenizer, "num_replaced_documents", 0)
        if count > self.count:
            self.count = count
            _log.warning(
                "%d documents read by this process were not UTF-8; "
                "their invalid bytes were replaced.",
                self.count,
            )
