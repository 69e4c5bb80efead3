"""Serves a model over HTTP, as OpenAI's API does: ``python -m experiments.serve --workdir=FOLDER``.

``FOLDER`` is the workdir of ``experiments.train``; the program loads its newest checkpoint.
``--pretrained=FOLDER`` serves a public model instead, and ``--segment`` gives it caches. Needs
``pip install '.[serve]'``. It listens on this machine alone, and has no passwords: put a
proxy that has them in front of it before others can reach it.

SIGTERM or Ctrl-C ends it once running requests are done, at most ``--grace`` seconds later; a
second one ends it at once. docs/serving.md lists what it serves.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from absl import logging as absl_logging

import memcache_jax as mc
from experiments._program import run
from experiments._source import is_public, read_model, source
from memcache_jax.generation.prompts import longest
from memcache_jax.training.tokenizers import Tokenizer

if TYPE_CHECKING:
    from memcache_jax.serving.http import ChatTemplate

_HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "The port; 0 takes a free one.", 0, 65535)
_NAME = flags.DEFINE_string("name", None, "The model's name to clients; its folder's by default.")
_ROWS = flags.DEFINE_integer("rows", 16, "Requests that are decoded at once.", 1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 4096, "Tokens of a prompt and its answer.", 2)
_PIECE = flags.DEFINE_integer("piece", 128, "Tokens of a prompt between two steps.", 1)
_AHEAD = flags.DEFINE_integer("ahead", 1, "Tokens of a row in a call, where no prompt waits.", 1)
_QUEUE = flags.DEFINE_integer("queue", 1024, "Requests that wait; more are refused.", 1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Tokens of an answer at most.", 1)
_MAX_BODY = flags.DEFINE_integer("max_body", 1 << 22, "Bytes of a request's body at most.", 1)
_STORE_MB = flags.DEFINE_integer("store_mb", 0, "MB for caches of known prompts; 0 keeps none.", 0)
_TEMPLATE = flags.DEFINE_string(
    "chat_template",
    None,
    "A file in Jinja, or 'plain' for lines of User: and Assistant:; the folder's own by default.",
)
_GRACE = flags.DEFINE_integer("grace", 30, "Seconds for running requests at the end.", 0)


def program() -> None:
    """Serves until a signal."""
    try:
        from memcache_jax.serving.http import Limits, Server, serve
    except ImportError as e:
        raise ImportError(f"{e}: pip install '.[serve]' in a checkout") from e
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs every step it takes
    folder, template = source(), _template()
    model, tokenizer = read_model()
    length = min(_MAX_LENGTH.value, longest(model) or _MAX_LENGTH.value)
    store = mc.PrefixStore(_STORE_MB.value * 10**6) if _STORE_MB.value else None
    sizes: dict[str, Any] = dict(rows=_ROWS.value, max_length=length, piece=_PIECE.value)
    sizes |= dict(ahead=_AHEAD.value, most_waiting=_QUEUE.value)
    batcher = mc.Batcher(model, **sizes, store=store)
    choices = min(Limits.choices, _QUEUE.value)  # more would never find room in the queue
    limits = Limits(body=_MAX_BODY.value, new_tokens=_MAX_TOKENS.value, choices=choices)
    name = _NAME.value or folder.absolute().name
    server = Server(batcher, tokenizer, model=name, template=template, limits=limits)

    def ready(port: int) -> None:
        print(f"Serving {name} at http://{_HOST.value}:{port}/v1", file=sys.stderr, flush=True)

    with batcher:
        _compile(batcher, tokenizer)
        serve(server, _HOST.value, _PORT.value, grace=_GRACE.value, ready=ready)


def _compile(batcher: mc.Batcher, tokenizer: Tokenizer) -> None:
    """Answers a prompt of each piece size, so that no client waits for compilation."""
    sizes = [2**i for i in range(batcher.piece.bit_length()) if 2**i < batcher.max_length]
    # Largest first: a store then knows no prefix of the prompts that follow.
    for number, size in enumerate(reversed(sizes), start=1):
        print(f"Compiling {number} of {len(sizes)} ...", file=sys.stderr, flush=True)
        batcher.submit([tokenizer.eos_id] * size, min(2, batcher.max_length - size)).result()


def _template() -> "ChatTemplate | None":
    """The template that the flags name, or that of the public model's folder."""
    from memcache_jax.serving.http import PLAIN, ChatTemplate

    given = _TEMPLATE.value
    if given == "plain":
        return ChatTemplate(PLAIN)
    if given is not None:
        return ChatTemplate(Path(given).read_text())
    return ChatTemplate.of_folder(source()) if is_public() else None


if __name__ == "__main__":
    run(program)
