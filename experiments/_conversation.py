"""Text that a decoder adds to a prompt, or to the lines of a conversation."""

import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np

import memcache_jax as mc
from memcache_jax.training.tokenizers import Tokenizer, added_text


def converse(
    decoder: mc.Decoder,
    tokenizer: Tokenizer,
    lines: Iterable[bytes],
    *,
    max_new_tokens: int,
    stop: bool,
) -> None:
    """Continues every line, up to an empty one; all of them share the decoder's cache.

    A line that cannot be read is told, and the conversation goes on as if it had not been typed.

    Args:
      decoder: of one row.
      tokenizer: that of its model.
      lines: as typed.
      max_new_tokens: of an answer, which also ends where the cache is full.
      stop: whether the end of a document ends an answer.
    """
    for line in map(bytes.rstrip, lines):
        if not line:
            return
        try:
            line.decode()
            tokens = tokenizer.encode(line + b"\n")
            decoder.feed(tokens[None])
        except ValueError as e:  # not UTF-8, no token in it, or more of them than there is room for
            _tell(f"That line was not read: {e}")
            continue
        print_continuation(
            tokenizer, continuation(decoder, tokenizer, max_new_tokens, stop=stop), tokens
        )
        if _room(decoder) == 0:
            _tell("The conversation is at its end: start one with a larger --max_length.")


def continuation(
    decoder: mc.Decoder, tokenizer: Tokenizer, max_new_tokens: int, *, stop: bool
) -> Iterator[int]:
    """Yields the tokens that follow in the one row, as long as there is room for them."""
    room = _room(decoder)
    for _ in range(max_new_tokens if room is None else min(max_new_tokens, room)):
        token = int(decoder.next()[0])
        yield token
        if stop and token == tokenizer.eos_id:
            return


def print_continuation(
    tokenizer: Tokenizer,
    continuation: Iterator[int],
    prompt: np.ndarray,
    *,
    with_prompt: bool = False,
) -> None:
    """Prints the continuation of a prompt as text while it is generated, then the speed."""
    before, tokens = ([], prompt.tolist()) if with_prompt else (prompt, [])
    printed, times = "", []
    for token in continuation:
        times.append(time.perf_counter())
        tokens.append(token)
        text = added_text(tokenizer, before, tokens)
        if not text.endswith("\ufffd"):  # an incomplete character
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print(added_text(tokenizer, before, tokens)[len(printed) :], flush=True)
    if len(times) > 2:  # the first two include compilation
        rate = (len(times) - 2) / (times[-1] - times[1])
        _tell(f"{len(times)} tokens, {rate:.0f} tokens/s")


def _room(decoder: mc.Decoder) -> int | None:
    most = decoder.cache.max_length
    return None if most is None else most - int(decoder.cache.position[0])


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
