"""Shows which past segments each token reads.

    python -m experiments.inspect --workdir=RUN --text=FILE

``RUN`` is the workdir of ``experiments.train``. ``--pretrained=FOLDER`` reads a public model
instead, and ``--segment`` gives it caches. The model reads the text, and its gates over cached and
live states become a page, ``inspect.html``, which needs no network. Pointing at a token shows what
it read, in each layer and head, and colors the text by those gates. ``inspect.png`` draws the
gates of three layers, and ``inspect.json`` has the numbers.
"""

from pathlib import Path

from absl import flags

from experiments._gates_page import as_json, page
from experiments._gates_picture import picture
from experiments._program import run
from experiments._reads import inspect
from experiments._source import read_model, source
from memcache_jax.training.durable import replace_file

_TEXT = flags.DEFINE_string("text", None, "The file to read.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the results; the workdir by default.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 1024, "Maximum tokens to read from the text.")

_KINDS = ("html", "png", "json")


def program() -> None:
    """Writes the page and the numbers."""
    if _MAX_TOKENS.value < 1:
        raise ValueError(f"max_tokens must be at least 1, got {_MAX_TOKENS.value}")
    file = Path(_TEXT.value)
    text = file.read_bytes()
    model, tokenizer = read_model()
    tokens = tokenizer.encode(text)[: _MAX_TOKENS.value]
    found = inspect(model, tokenizer, tokens)
    folder = Path(_OUTPUT.value or source())
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "inspect.json", as_json(found) + "\n")
    title = f"{file.name} read by {source().resolve().name}"
    replace_file(folder / "inspect.html", page(found, title))
    picture(found).savefig(folder / "inspect.png", dpi=120)
    print(f"{len(tokens)} tokens")
    for layer in found["layers"]:
        cached = 1 - layer["gates"][..., -1].mean(axis=0)
        shown = " ".join(f"{x:.3f}" for x in cached)
        print(f"{layer['name']}\n  weight of cached states by head, mean over tokens: {shown}")
    print(f"written: {', '.join(str(folder / f'inspect.{kind}') for kind in _KINDS)}")


if __name__ == "__main__":
    run(program)
