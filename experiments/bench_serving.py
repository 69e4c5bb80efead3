"""Times serving: many rows at once, known prefixes, and drafts.

    python -m experiments.bench_serving --config=configs/demo.py [--workdir=FOLDER] [--parts=rows]

What a part compares is compiled first and then timed in turn, so that noise affects all alike. The
table has the median of the rounds, and processor seconds, the least of the rounds, which other work
on the machine disturbs less; below each part are ratios of both.

- ``rows``: requests in the rows of an ``mc.Batcher``, beside as many calls of ``mc.generate`` one
  after the other, and beside one call with all rows. For decoding alone, the time that two new
  tokens take is subtracted in each round, and the medians of what is left are compared.
- ``prefix``: the first token after a prompt of which an ``mc.PrefixStore`` knows 90 %, beside one
  that it does not know.
- ``verify``: ``--verify`` more tokens after ``--long`` in one call, as drafts are verified, beside
  as many calls of one token. Both then rewind the cache.
- ``draft``: greedy decoding with ``mc.NGrams`` beside plain decoding, and whether tokens are equal.

Prompts are Python code, that of the standard library, as bytes. Without ``--workdir``, the folder
of a training run, the model is the configuration's, not trained: its text repeats itself more than
a trained model's, which favors drafts.
"""

import argparse
import functools
import json
import operator
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from experiments._program import ConfigFlag, run

FLAGS = flags.FLAGS
_PARTS = ["rows", "prefix", "verify", "draft"]
_CONFIG = ConfigFlag()
flags.DEFINE_string("workdir", None, "A training run, whose model is timed.")
flags.DEFINE_multi_enum("parts", _PARTS, _PARTS, "What.")
flags.DEFINE_integer("rows", 16, "Requests at once.", 2)
flags.DEFINE_integer("ahead", 4, "Tokens of a row in a call of the batcher.", 1)
flags.DEFINE_integer("prompt", 64, "Tokens of a request's prompt.", 1)
flags.DEFINE_integer("new", 128, "New tokens of a request.", 3)
flags.DEFINE_integer("long", 1280, "Tokens of the prompt whose beginning is known.", 20)
flags.DEFINE_integer("verify", 8, "Tokens that one call takes.", 2)
flags.DEFINE_integer("rounds", 3, "Timed rounds.", 1)
flags.DEFINE_string("json", None, "File to write the table to.")

BYTES = 256  # the least vocabulary


def read_model() -> Any:
    """The model to time.

    Raises:
      ValueError: for a vocabulary that lacks some bytes.
    """
    from flax import nnx

    import memcache_jax as mc
    from memcache_jax.training import load_model
    from memcache_jax.training.models import model_config

    if FLAGS.workdir is not None:
        model = load_model(FLAGS.workdir)[0]
    else:
        model = mc.nn.LanguageModel(model_config(_CONFIG.value.model), rngs=nnx.Rngs(0))
    if model.config.vocab_size < BYTES:
        raise ValueError(f"prompts are bytes, got a vocabulary of {model.config.vocab_size}")
    return model


def code(tokens: int, begin: int = 0) -> Any:
    """So many bytes of Python code, as token ids."""
    import numpy as np

    text = Path(argparse.__file__).read_bytes()
    return np.resize(np.frombuffer(text[begin:], np.uint8), tokens).astype(np.int32)


def rows(model: Any, new: int) -> dict[str, Callable[[], Any]]:
    """What reads prompts and decodes so many tokens of all requests, by name."""
    import numpy as np

    import memcache_jax as mc

    prompts = np.stack([code(FLAGS.prompt, 1000 * row) for row in range(FLAGS.rows)])
    sizes: dict[str, Any] = dict(rows=FLAGS.rows, ahead=FLAGS.ahead)
    batcher = mc.Batcher(model, max_length=FLAGS.prompt + new, **sizes)

    def of_batcher() -> list:
        requests = [batcher.submit(prompt, new) for prompt in prompts]
        batcher.run()
        return [request.tokens for request in requests]

    def at_once(prompts: Any) -> list:
        tokens = mc.generate(model, prompts, new, temperature=0)
        return np.asarray(tokens)[:, FLAGS.prompt :].tolist()

    return {
        "batcher": of_batcher,
        "one after the other": lambda: [at_once(prompt[None])[0] for prompt in prompts],
        "one call": lambda: at_once(prompts),
    }


def prefix(model: Any) -> dict[str, Callable[[], Any]]:
    """What reads a long prompt up to its first new token, by name."""
    import numpy as np

    import memcache_jax as mc

    empty, prompt = model.init_cache(1, FLAGS.long + 1), code(FLAGS.long)
    known = mc.PrefixStore(1 << 32)
    known.prefill(model, prompt[: FLAGS.long * 9 // 10], empty)
    variant = iter(range(1, 1 << 30))

    def read(store: mc.PrefixStore) -> int:
        # Another end each time: only the beginning is known.
        tokens = np.append(prompt[:-1], next(variant) % BYTES)
        return int(np.argmax(store.prefill(model, tokens, empty)[0]))

    return {"known": lambda: read(known), "cold": lambda: read(mc.PrefixStore(1 << 32))}


def verify(model: Any) -> dict[str, Callable[[], Any]]:
    """What takes the same tokens and goes back, by name; each returns the next token."""
    import jax
    from flax import nnx

    from memcache_jax.nn.unrolled import for_steps
    from memcache_jax.streaming.loops import Slim

    model = for_steps(model)
    graph, state = nnx.split(model)
    count = FLAGS.verify
    tokens = code(FLAGS.long + count)[None]

    @functools.partial(jax.jit, donate_argnames="cache")
    def extend(state: Any, tokens: Any, cache: Slim) -> tuple[Any, Slim]:
        model = nnx.merge(graph, state)
        hidden, after = model.extend(tokens, cache.full(), None)
        return model.logits(hidden[:, -1]).argmax(), Slim.of(after)

    back = jax.jit(lambda cache: Slim.of(cache.full().rewind(count)), donate_argnums=0)
    empty = Slim.of(model.init_cache(1, tokens.shape[1], rewind=count))
    caches = [extend(state, tokens[:, :-count], empty)[1]]

    def take(size: int) -> int:
        cache, last = caches.pop(), None
        for begin in range(FLAGS.long, tokens.shape[1], size):
            last, cache = extend(state, tokens[:, begin : begin + size], cache)
        caches.append(back(cache))
        return int(last)  # pyright: ignore[reportArgumentType]

    return {"one call": lambda: take(count), "one by one": lambda: take(1)}


def draft(model: Any) -> dict[str, Callable[[], Any]]:
    """What decodes one row greedily, by name."""
    import numpy as np

    import memcache_jax as mc

    prompt = code(FLAGS.prompt, 4000)[None]

    def decode(draft: Any) -> list:
        tokens = mc.generate(model, prompt, FLAGS.new, temperature=0, draft=draft)
        return np.asarray(tokens)[0].tolist()

    return {"n-grams": lambda: decode(mc.NGrams()), "plain": lambda: decode(None)}


def in_turn(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """The times of each, and what it returned first."""
    found: dict[str, dict[str, Any]] = {
        name: dict(result=function(), seconds=[], processor=[])
        for name, function in functions.items()
    }
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter(), time.process_time()
            function()
            found[name]["seconds"].append(time.perf_counter() - begin[0])
            found[name]["processor"].append(time.process_time() - begin[1])
    return found


def times_of(part: str, model: Any) -> dict[str, dict[str, tuple[float, float]]]:
    """Seconds and processor seconds by name, of the part and of decoding alone."""
    made = dict(prefix=prefix, verify=verify, draft=draft)
    functions = rows(model, FLAGS.new) if part == "rows" else made[part](model)
    of_two = rows(model, 2) if part == "rows" else {}
    shorter = {f"{name}, 2 tokens": function for name, function in of_two.items()}
    times = in_turn(functions | shorter, FLAGS.rounds)
    if part != "prefix":
        first, *others = (times[name]["result"] for name in functions)
        print(f"equal tokens: {all(other == first for other in others)}", flush=True)

    def of_decoding(name: str, key: str) -> float:
        both = times[name][key], times[f"{name}, 2 tokens"][key]
        return statistics.median(map(operator.sub, *both))

    whole = {
        name: (statistics.median(times[name]["seconds"]), min(times[name]["processor"]))
        for name in functions
    }
    alone = {
        name: (of_decoding(name, "seconds"), of_decoding(name, "processor")) for name in of_two
    }
    return {part: whole} | ({"decoding alone": alone} if alone else {})


def main() -> None:
    """Times all parts."""
    model, table = read_model(), []
    for part in FLAGS.parts:
        for title, lines in times_of(part, model).items():
            print(f"\n{title:28} {'seconds':>10} {'processor':>10}")
            for name, (seconds, processor) in lines.items():
                print(f"{name:28} {seconds:10.3f} {processor:10.3f}")
                table.append(dict(part=title, name=name, seconds=seconds, processor=processor))
            (first, own), *others = lines.items()
            for name, other in others:
                ratios = [b / a for a, b in zip(own, other, strict=True)]
                print(f"{first + ' : ' + name:28} {ratios[0]:9.2f}x {ratios[1]:9.2f}x", flush=True)
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    run(main)
