"""Tokenizers: raw bytes, or a Hugging Face ``tokenizers`` JSON file."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from memcache_jax.pretrained.given import read_object

EOS_TOKENS = ("</s>", "<|endoftext|>", "<eos>", "[SEP]", "<|end_of_text|>")


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    name: str
    eos_id: int
    vocab_size: int

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the int32 ids of ``text``, with no special tokens added."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text of ``ids``, without end-of-document tokens."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes; 256 ends a document.

    Example:
      >>> ByteTokenizer().encode("né".encode()).tolist()
      [110, 195, 169]
    """

    name = "bytes"
    eos_id = 256
    vocab_size = 257

    def encode(self, text: bytes) -> np.ndarray:
        """Returns one int32 id per byte of ``text``."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text of ``ids``, without those above 255."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A tokenizer read from a Hugging Face ``tokenizers`` JSON file.

    Ignores the file's truncation and padding, which would cut or pad documents. Text that reads
    like a special token stays text: no document holds the end token, and decoding gives it back.

    Attributes:
      eos_token: the token that ends a document, by name.
      num_replaced_documents: how many documents this process has encoded that were not UTF-8,
        with U+FFFD for invalid bytes; a document read twice counts twice.
    """

    def __init__(self, path: str | os.PathLike[str], *, eos_token: str | None = None):
        """Reads the file.

        Args:
          path: the JSON file.
          eos_token: the token that ends a document; by default the first of ``EOS_TOKENS`` in the
            vocabulary.

        Raises:
          ValueError: if there is no such file, if it is not a tokenizer, or if its vocabulary
            lacks the end token.
          ImportError: if the package ``tokenizers`` is not installed.
        """
        if not Path(path).is_file():
            raise ValueError(f"tokenizer must be 'bytes' or a file, got {str(path)!r}: not found")
        try:
            import tokenizers
        except ImportError as e:
            raise ImportError(
                f"reading {path} needs the package tokenizers: pip install tokenizers"
            ) from e
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the package raises bare Exceptions
            raise ValueError(f"{path} is not a Hugging Face tokenizers JSON file: {e}") from e
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = str(path)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        # Not the number of tokens: ids may have gaps, and the embedding must hold the largest.
        self.vocab_size = max(vocab.values(), default=-1) + 1
        candidates = EOS_TOKENS if eos_token is None else (eos_token,)
        found = [token for token in candidates if token in vocab]
        if not found:
            raise ValueError(
                f"{path} has no end-of-document token: looked for {', '.join(candidates)}; "
                "pass eos_token= a token of its vocabulary"
            )
        self.eos_token, self.eos_id = found[0], vocab[found[0]]
        self._keep_text_text()
        self._spelled = self._spell(self.eos_token)
        self.num_replaced_documents = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Sets what a pickled tokenizer of the package forgets."""
        self.__dict__.update(state)
        self._keep_text_text()

    def _keep_text_text(self) -> None:
        self._tokenizer.add_special_tokens([self.eos_token])
        self._tokenizer.encode_special_tokens = True

    def _spell(self, token: str) -> list[int]:
        """Returns ids of a token's characters, for vocabularies that hold it as a word of text."""
        ids = []
        for character in token:
            found = [character, *(f"<0x{byte:02X}>" for byte in character.encode())]
            known = [self._tokenizer.token_to_id(name) for name in found]
            if known[0] is not None:
                ids.append(known[0])
            elif None not in known[1:]:
                ids += known[1:]
            else:
                ids += self._tokenizer.encode(character, add_special_tokens=False).ids
        return [i for i in ids if i != self.eos_id]

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the int32 ids of ``text``, read as UTF-8 with invalid bytes replaced."""
        try:
            string = text.decode("utf-8")
        except UnicodeDecodeError:
            string = text.decode("utf-8", errors="replace")
            self.num_replaced_documents += 1
        ids = np.asarray(self._tokenizer.encode(string, add_special_tokens=False).ids, np.int32)
        ends = np.flatnonzero(ids == self.eos_id)
        if not ends.size:
            return ids
        parts = np.split(ids, np.stack([ends, ends + 1], axis=1).ravel())
        parts[1::2] = [np.array(self._spelled, np.int32)] * len(ends)
        return np.concatenate(parts)

    def encode_marked(self, text: bytes) -> np.ndarray:
        """Returns the ids of ``text`` whose special tokens are tokens, as of chat templates."""
        string = text.decode("utf-8")
        return np.asarray(self._marked.encode(string, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _marked(self) -> Any:
        import tokenizers

        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text of ``ids``, without the end-of-document tokens."""
        kept = [i for i in map(int, ids) if i != self.eos_id]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def added_text(
    tokenizer: Tokenizer, before: Iterable[int] | np.ndarray, ids: Iterable[int] | np.ndarray
) -> str:
    """Returns the text that ids add to those before them.

    That is not the text of the ids alone where words begin with a space, which many tokenizers drop
    at the beginning of a text, or where a character is spread over both.

    Example:
      >>> added_text(ByteTokenizer(), [110, 195], [169, 101])
      'ée'
    """
    told = tokenizer.decode(before)
    whole = tokenizer.decode([*map(int, before), *map(int, ids)])
    if not whole.startswith(told):
        told = told.rstrip("\ufffd")  # of a character that the ids complete
    return whole[len(told) :]


def end_token_of(folder: Path) -> str | None:
    """Returns the token that ends a document, as a public model's folder names it, if it does.

    Raises:
      ValueError: that names the file, if it is not as the package transformers writes it.
    """
    options = folder / "tokenizer_config.json"
    if not options.is_file():
        return None
    given = read_object(options).get("eos_token")
    token = given.get("content") if isinstance(given, dict) else given
    if not isinstance(token, str | None):
        raise ValueError(f"{options}: eos_token must be a token's text, got {given!r:.100}")
    return token


def published_tokenizer(folder: Path) -> FileTokenizer:
    """Returns a public model's tokenizer, which ends documents with the token it names."""
    return FileTokenizer(folder / "tokenizer.json", eos_token=end_token_of(folder))


def make_tokenizer(
    name: str, *, eos_token: str | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """Returns a tokenizer by name.

    Args:
      name: "bytes", or the path of a Hugging Face ``tokenizers`` JSON file.
      eos_token: the token that ends a document, for a file; see ``FileTokenizer``.
      vocab_size: the model's number of ids, to check that it covers the tokenizer's.

    Raises:
      ValueError: if the tokenizer has more ids than the model, or as ``FileTokenizer`` does.
    """
    if name == "bytes":
        if eos_token is not None:
            raise ValueError(f"the tokenizer 'bytes' has a fixed end token, got {eos_token=}")
        tokenizer = ByteTokenizer()
    else:
        tokenizer = FileTokenizer(name, eos_token=eos_token)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {name!r} has {tokenizer.vocab_size} ids, but the model's vocab_size is "
            f"{vocab_size}: set it to at least {tokenizer.vocab_size}"
        )
    return tokenizer
