"""Continues a text with a trained model: ``python -m experiments.generate --workdir=FOLDER``.

``FOLDER`` is the workdir of ``experiments.train``, which may still be running; the program loads
its newest checkpoint. ``--pretrained=FOLDER`` reads a public model instead, and ``--segment`` gives
it caches. With ``--interactive`` it continues every line you type, with one cache for the whole
conversation; a line that it cannot read ends nothing.
"""

import sys
from typing import Any

import jax
import numpy as np
from absl import flags

import memcache_jax as mc
from experiments._conversation import continuation, converse, print_continuation
from experiments._program import run
from experiments._source import read_model
from memcache_jax.generation.prompts import longest

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
    try:
        prompt = _PROMPT.value.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"prompt must be UTF-8 text: {e}") from e
    model, tokenizer = read_model()
    tokens = tokenizer.encode(prompt)
    if not tokens.size:
        tokens = np.array([tokenizer.eos_id], np.int32)  # precedes every document in training
    length = len(tokens) + _MAX_NEW_TOKENS.value
    if _INTERACTIVE.value:
        length = min(_MAX_LENGTH.value, longest(model) or _MAX_LENGTH.value)
    decoder = mc.Decoder(
        model,
        max_length=length,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        key=jax.random.key(_SEED.value % 2**32),
    )
    answer: dict[str, Any] = dict(max_new_tokens=_MAX_NEW_TOKENS.value, stop=_STOP.value)
    if _PROMPT.value or not _INTERACTIVE.value:
        decoder.feed(tokens[None])
    if _INTERACTIVE.value:
        print("Type a line; an empty line or the end of input quits.", file=sys.stderr)
        converse(decoder, tokenizer, sys.stdin.buffer, **answer)
    else:
        following = continuation(decoder, tokenizer, **answer)
        print_continuation(tokenizer, following, tokens, with_prompt=True)


if __name__ == "__main__":
    run(program)
