"""Text as it comes from tokens: never half a character, and no part of a stop text."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np

_BROKEN = "\ufffd"
_CONTEXT = 8  # tokens before, on which a token's text may depend
_PATIENCE = 64  # tokens without a whole character, after which they are told as they are


@runtime_checkable
class Tokenizer(Protocol):
    """What the server needs of a tokenizer; those of ``mc.training`` have it.

    Attributes:
      eos_id: the token that ends a document.
    """

    eos_id: int

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of a text, without special tokens."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of ids, U+FFFD for what is no whole character."""
        ...


class Detokenizer:
    """The text of tokens, piece by piece.

    A piece never ends within a character: what could be a part of one waits for the next tokens.

    Args:
      decode: the text of token ids.
      before: the tokens that are followed.

    Example:
      >>> from memcache_jax.training.tokenizers import ByteTokenizer
      >>> text = Detokenizer(ByteTokenizer().decode)
      >>> [text.add(byte) for byte in "né".encode()]
      ['n', '', 'é']
    """

    def __init__(
        self, decode: Callable[[list[int]], str], before: Iterable[int] | np.ndarray = ()
    ) -> None:
        self._decode = decode
        self._window = [int(token) for token in before][-_CONTEXT:]
        self._whole = len(self._window)
        self._told = decode(self._window)

    def add(self, token: int) -> str:
        """The text that a token adds."""
        self._window.append(token)
        text = self._decode(self._window)
        waits = text.endswith(_BROKEN) and len(self._window) - self._whole < _PATIENCE
        piece, told = self._new(text.rstrip(_BROKEN) if waits else text, text)
        if not waits:
            self._window = self._window[self._whole :]
            self._whole, self._told = len(self._window), self._decode(self._window)
        elif piece:
            self._told = told
        return piece

    def end(self) -> str:
        """What has waited."""
        text = self._decode(self._window)
        return self._new(text, text)[0]

    def _new(self, safe: str, text: str) -> tuple[str, str]:
        told = self._told if text.startswith(self._told) else self._told.rstrip(_BROKEN)
        return safe[len(told) :], safe


class Stops:
    r"""Looks for texts that end an answer; what could begin one waits.

    Args:
      texts: those that end it.

    Example:
      >>> stops = Stops(["\n\n"])
      >>> [stops.add(piece) for piece in ("a\n", "b\n", "\nc")]
      [('a', False), ('\nb', False), ('', True)]
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self._held = tuple(texts), ""

    def add(self, piece: str) -> tuple[str, bool]:
        """The text to tell, and whether a stop has come; nothing of it is told."""
        text = self._held + piece
        places = [place for stop in self._texts if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        begun = max((_overlap(text, stop) for stop in self._texts), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun], False

    def end(self) -> str:
        """What has waited."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The most characters at a text's end that begin a stop."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


class Vocabulary:
    """A tokenizer's texts and ids, as the API tells them.

    Attributes:
      tokenizer: the tokenizer.
      end: the name of the token that ends a document.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end = getattr(tokenizer, "eos_token", "<|endoftext|>")
        self._anchor = tokenizer.encode(b"a").tolist()[-1:]  # words may begin with a space
        self._before = tokenizer.decode(self._anchor)
        self._names: dict[int, str] = {}

    def encode(self, text: str) -> np.ndarray:
        """A text's ids; of an empty one, the token that precedes every document."""
        ids = self.tokenizer.encode(text.encode())
        return ids if len(ids) else np.array([self.tokenizer.eos_id], np.int32)

    def encode_chat(self, text: str) -> np.ndarray:
        """The ids of a template's text, in which names of special tokens are those tokens."""
        encode = getattr(self.tokenizer, "encode_marked", self.tokenizer.encode)
        return encode(text.encode())

    def name(self, token: int) -> str:
        """A token's text, ``token_id:N`` where it is no whole text of its own."""
        if token not in self._names:
            text = self.tokenizer.decode([*self._anchor, token])[len(self._before) :]
            if token == self.tokenizer.eos_id:
                text = self.end
            self._names[token] = f"token_id:{token}" if not text or _BROKEN in text else text
        return self._names[token]
