"""A run's text: its tokenizer, the records to train on, the held-out rows, and what they are."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from memcache_jax.training.config import Config
from memcache_jax.training.data import HeldOut, heldout_rows
from memcache_jax.training.files import Records, find_files, split_files
from memcache_jax.training.tokenizers import FileTokenizer, Tokenizer, make_tokenizer

_log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """The text of a run.

    Attributes:
      tokenizer: turns text into ids.
      train: the documents to train on.
      heldout: the rows to measure on.
      identity: numbers of files and bytes, and digests, which are equal if the text is.
    """

    tokenizer: Tokenizer
    train: Records
    heldout: HeldOut
    identity: dict[str, Any]


def load_corpus(config: Config) -> Corpus:
    """Finds, splits and indexes the files that ``config.data`` names.

    Raises:
      ValueError: if there are no files, they hold too little text, or the tokenizer does not fit.
    """
    options = config.data
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
    sizes = [(file.as_posix(), file.stat().st_size) for file in (*train, *heldout)]
    num_bytes = sum(size for _, size in sizes[: len(train)])
    _log.info(
        "Data: %d files to train on (%.1f MB), %d held out (%d tokens measured).",
        *(len(train), num_bytes / 1e6, len(heldout), rows.tokens[:, 1:].size),
    )
    identity = {
        "train_files": len(train),
        "heldout_files": len(heldout),
        "train_bytes": num_bytes,
        "names_and_sizes": hashlib.sha1(json.dumps(sizes).encode()).hexdigest(),
        "tokenizer": "bytes"
        if options.tokenizer == "bytes"
        else hashlib.sha1(Path(options.tokenizer).read_bytes()).hexdigest(),
    }
    return Corpus(tokenizer, records, rows, identity)


class ReplacedDocuments:
    """Tells how many documents were not UTF-8, whenever there are more than it told before."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.count = 0

    def tell(self) -> None:
        """Logs the count if it has grown."""
        if not isinstance(self._tokenizer, FileTokenizer):
            return
        if self._tokenizer.num_replaced_documents > self.count:
            self.count = self._tokenizer.num_replaced_documents
            _log.warning(
                "%d documents read so far were not UTF-8; their invalid bytes were replaced.",
                self.count,
            )
