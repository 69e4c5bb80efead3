"""Continues a text with a trained model: ``python -m experiments.generate --workdir=FOLDER``.

``FOLDER`` is the workdir of ``experiments.train``, which may still be running; the program loads
its newest checkpoint. With ``--interactive`` it continues every line you type, with one cache for
the whole conversation.
"""

import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags

import memcache_jax as mc
from experiments._program import run
from memcache_jax.training import load_model
from memcache_jax.training.tokenizers import Tokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.", required=True)
_PROMPT = flags.DEFINE_string("prompt", "", "The text to continue; empty starts a new document.")
_INTERACTIVE = flags.DEFINE_bool("interactive", False, "Continue lines from standard input.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Maximum tokens to add.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 16384, "Maximum tokens of a conversation.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Divides the logits; 0 takes the most likely token."
)
_TOP_K = flags.DEFINE_integer("top_k", None, "Samples from this many most likely tokens.")
_TOP_P = flags.DEFINE_float(
    "top_p", 0.95, "Samples from the fewest most likely tokens whose probabilities sum to this."
)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", -(2**63), 2**63 - 1)
_STOP = flags.DEFINE_bool("stop", True, "Stop at the end of the document.")


def program() -> None:
    """Prints the prompt and its continuation as they are generated."""
    if _MAX_NEW_TOKENS.value < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {_MAX_NEW_TOKENS.value}")
    model, tokenizer, _ = load_model(_WORKDIR.value)
    prompt = tokenizer.encode(_PROMPT.value.encode())
    if not prompt.size:
        prompt = np.array([tokenizer.eos_id], np.int32)  # precedes every document in training
    length = _MAX_LENGTH.value if _INTERACTIVE.value else len(prompt) + _MAX_NEW_TOKENS.value
    decoder = mc.Decoder(
        model,
        max_length=length,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        key=jax.random.key(_SEED.value),
    )
    if not _INTERACTIVE.value:
        decoder.feed(prompt[None])
        _print(tokenizer, _continuation(decoder, tokenizer), prompt.tolist())
        return
    if _PROMPT.value:
        decoder.feed(prompt[None])
    print("Type a line; an empty line or the end of input quits.", file=sys.stderr)
    for line in map(str.rstrip, sys.stdin):
        if not line:
            break
        decoder.feed(tokenizer.encode(f"{line}\n".encode())[None])
        _print(tokenizer, _continuation(decoder, tokenizer), [])


def _continuation(decoder: mc.Decoder, tokenizer: Tokenizer) -> Iterator[int]:
    for _ in range(_MAX_NEW_TOKENS.value):
        token = int(decoder.next()[0])
        yield token
        if _STOP.value and token == tokenizer.eos_id:
            return


def _print(tokenizer: Tokenizer, continuation: Iterator[int], tokens: list[int]) -> None:
    """Prints tokens and their continuation as text while it is generated, then the speed."""
    printed, times = "", []
    for token in continuation:
        times.append(time.perf_counter())
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # an incomplete character
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print(tokenizer.decode(tokens)[len(printed) :], flush=True)
    if len(times) > 2:  # the first two include compilation
        rate = (len(times) - 2) / (times[-1] - times[1])
        print(f"{len(times)} tokens, {rate:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run(program)
