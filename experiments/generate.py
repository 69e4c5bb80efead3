"""Continues a text with a trained model: ``python -m experiments.generate --workdir=FOLDER``.

``FOLDER`` is the workdir of ``experiments.train``; the newest checkpoint in it is used, also while
the run goes on.
"""

import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags

import memcache_jax as mc
from memcache_jax.training import load_model

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a training run.", required=True)
_PROMPT = flags.DEFINE_string("prompt", "", "The text to continue; a new document where empty.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "How many tokens to add at most.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Divides the logits; 0 takes the most likely token."
)
_TOP_P = flags.DEFINE_float(
    "top_p", 0.95, "Samples from the most likely tokens that have this probability together."
)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.")
_STOP = flags.DEFINE_bool("stop", True, "Whether to end where the model ends the document.")


def main(argv: Sequence[str]) -> None:
    """Prints the prompt and what follows it."""
    if len(argv) > 1:
        raise app.UsageError(f"expected only flags, got {' '.join(argv[1:])}")
    try:
        print(_continue())
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)


def _continue() -> str:
    model, tokenizer, _ = load_model(_WORKDIR.value)
    prompt = tokenizer.encode(_PROMPT.value.encode())
    if not prompt.size:
        prompt = np.array([tokenizer.eos_id], np.int32)  # what a document follows in training
    tokens = mc.generate(
        model,
        prompt[None],
        _MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        stop_token=tokenizer.eos_id if _STOP.value else None,
        key=jax.random.key(_SEED.value),
    )
    return tokenizer.decode(np.asarray(tokens[0]))


if __name__ == "__main__":
    app.run(main)
