"""Measures training and decoding speed by length (Fig. 4 of arXiv:2602.24281).

    python -m experiments.throughput --config=configs/throughput.py --workdir=FOLDER

Training is one update of a language model (gradient and AdamW) at a fixed number of tokens per
batch, so that a rule without a cache takes the same time at every length. Decoding is the next
token of one stream, from a cache sized for a history; the table also has that cache's bytes. The
cache stays empty: its arrays have their full size from the start, so that a step costs the same at
every position. Times are medians of ``config.rounds`` after one warm-up round; compilation is timed
separately. Cases that run out of memory say so in the table.

Tokens are random and nothing is learned, since times do not depend on parameters. On a GPU,
attention in bfloat16 is cuDNN's in training; elsewhere, and for decoding, it is XLA's.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments._study import Case, Row, Study, new_figure, run
from memcache_jax import presets
from memcache_jax.nn import AttentionMixer, LanguageModel, LanguageModelConfig
from memcache_jax.training import default_config
from memcache_jax.training.optimizer import make_optimizer
from memcache_jax.training.pictures import tick_values
from memcache_jax.training.step import abstract_state, create_state, make_train_step

_MODEL = ("vocab_size", "num_layers", "features", "num_heads", "segment", "top_k", "dtype", "remat")
_TIMED = ("lengths", "histories", "tokens_per_batch", "rounds", "decode_tokens", "interleave")
KEYS = ("models", *_MODEL, *_TIMED)  # of the configuration


def groups(config: Any) -> list[list[Case]]:
    """Returns the cases of a study, training first; interleaved cases of a length are one group.

    Raises:
      ValueError: for invalid settings.
    """
    positive = ("tokens_per_batch", "rounds", "decode_tokens")
    if bad := [name for name in positive if config[name] < 1]:
        raise ValueError(f"{bad[0]} must be at least 1, got {config[bad[0]]}")
    if bad := [length for length in config.lengths if config.tokens_per_batch % length]:
        raise ValueError(
            f"lengths must divide tokens_per_batch={config.tokens_per_batch}, got {bad[0]}"
        )
    least = (config.rounds + 1) * config.decode_tokens
    if bad := [history for history in config.histories if history < least]:
        raise ValueError(
            f"histories must have room for the {least} tokens that are timed, got {bad[0]}"
        )
    device = jax.devices()[0]
    cudnn = device.platform == "gpu" and config.dtype == "bfloat16"
    shared = dict(
        model={name: config[name] for name in _MODEL},
        rounds=config.rounds,
        device=device.device_kind,
        jax=jax.__version__,
    )
    found = []
    for length in config.lengths:
        own = dict(
            what="train",
            tokens=length,
            batch=config.tokens_per_batch // length,
            attention="cudnn" if cudnn else "xla",
        )
        found.append([dict(name=name, **own, **shared) for name in config.models])
    for history in config.histories:
        own = dict(what="decode", tokens=history, timed=config.decode_tokens)
        found.append([dict(name=name, **own, **shared) for name in config.models])
    return found if config.interleave else [[case] for group in found for case in group]


def model_of(case: Case) -> LanguageModelConfig:
    """Returns the model of a case."""
    fields = dict(case["model"])
    mixers = presets.mixers(case["name"], segment=fields.pop("segment"), top_k=fields.pop("top_k"))
    if case.get("attention") == "cudnn":
        mixers = tuple(
            dataclasses.replace(mixer, implementation="cudnn")
            if isinstance(mixer, AttentionMixer)
            else mixer
            for mixer in mixers
        )
    return LanguageModelConfig(mixers=mixers, **fields)


class Training:
    """A compiled update, and its state."""

    def __init__(self, case: Case) -> None:
        model = model_of(case)
        optimizer = make_optimizer(default_config().optimizer, 1000)
        graph, target = abstract_state(model, optimizer)
        shape = case["batch"], case["tokens"] + 1
        self.tokens = jax.random.randint(jax.random.key(0), shape, 0, model.vocab_size)
        update: Any = make_train_step(graph, optimizer)
        begin = time.perf_counter()
        self.update = update.lower(target, self.tokens).compile()
        self.about = dict(compile_seconds=time.perf_counter() - begin)
        self.state = create_state(model, optimizer, 0)
        self.count = case["batch"] * case["tokens"]

    def __call__(self) -> None:
        """Runs one update."""
        self.state, metrics = self.update(self.state, self.tokens)
        jax.block_until_ready((self.state, metrics))


class Decoding:
    """A compiled decoding step, and a cache with room for its history."""

    def __init__(self, case: Case) -> None:
        model = LanguageModel(model_of(case), rngs=nnx.Rngs(0))
        graph, self.state = nnx.split(model)

        def extend(state: Any, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graph, state)
            hidden, cache = model.extend(tokens, cache)
            return jnp.argmax(model.logits(hidden[:, -1]), axis=-1)[:, None], cache

        self.token = jnp.zeros((1, 1), jnp.int32)
        self.cache = model.init_cache(1, case["tokens"])
        begin = time.perf_counter()
        step = jax.jit(extend, donate_argnums=2)
        self.step = step.lower(self.state, self.token, self.cache).compile()
        seconds = time.perf_counter() - begin
        self.about = dict(compile_seconds=seconds, cache_bytes=self.cache.nbytes)
        self.count = case["timed"]

    def __call__(self) -> None:
        """Decodes the tokens of a round, one after the other."""
        for _ in range(self.count):
            self.token, self.cache = self.step(self.state, self.token, self.cache)
        self.token.block_until_ready()


def measure(cases: list[Case]) -> list[Row]:
    """Times cases in interleaved rounds.

    Returns:
      For each case ``compile_seconds``, ``ms`` per update or token, ``tokens_per_second``, and for
      decoding ``cache_bytes``; or ``error``.
    """
    rows: list[Row] = [{} for _ in cases]
    jobs: dict[int, Any] = {}
    seconds: list[list[float]] = [[] for _ in cases]
    for i, case in enumerate(cases):
        with _memory_may_end(rows[i]):
            jobs[i] = (Training if case["what"] == "train" else Decoding)(case)
            rows[i] |= jobs[i].about
    for counts in [False] + [True] * cases[0]["rounds"]:
        for i in list(jobs):
            with _memory_may_end(rows[i]):
                begin = time.perf_counter()
                jobs[i]()
                if counts:
                    seconds[i].append(time.perf_counter() - begin)
            if "error" in rows[i]:
                del jobs[i]
    for i, job in jobs.items():
        median = statistics.median(seconds[i])
        ms = 1e3 * median / (1 if cases[i]["what"] == "train" else job.count)
        rows[i] |= dict(ms=ms, tokens_per_second=job.count / median)
    return rows


@contextlib.contextmanager
def _memory_may_end(row: Row) -> Iterator[None]:
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as e:
        if not isinstance(e, MemoryError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        row["error"] = "out of memory"


def table(rows: list[Row]) -> list[list[Any]]:
    """Returns the rows of the table, with dashes for missing values."""
    return [
        [
            row["what"],
            row["tokens"],
            row["name"],
            row.get("error") or f"{row['tokens_per_second']:,.0f}",
            row.get("ms", "-"),
            row["cache_bytes"] / 1e6 if "cache_bytes" in row else "-",
            round(row["compile_seconds"], 1) if "compile_seconds" in row else "-",
        ]
        for row in rows
    ]


HEADER = ("pass", "T or history", "model", "tokens/s", "ms", "cache MB", "compile s")


def picture(rows: list[Row]) -> Any:
    """Plots tokens/s by T, and time per token and megabytes of cache by history, where measured."""
    panels = (
        ("train", "tokens_per_second", 1, "T", "tokens per second, training"),
        ("decode", "ms", 1, "tokens of history", "milliseconds per token"),
        ("decode", "cache_bytes", 1e-6, "tokens of history", "megabytes of cache"),
    )
    panels = [panel for panel in panels if any(panel[1] in row for row in rows)]
    figure, (axes,) = new_figure(max(len(panels), 1))
    for axis, (what, key, scale, x_label, y_label) in zip(axes, panels, strict=False):
        for name in dict.fromkeys(row["name"] for row in rows):
            mine = [r for r in rows if (r["name"], r["what"]) == (name, what) and key in r]
            axis.plot([r["tokens"] for r in mine], [r[key] * scale for r in mine], label=name)
        axis.set(xlabel=x_label, ylabel=y_label)
        tick_values(axis, sorted({r["tokens"] for r in rows if r["what"] == what and key in r}))
        if key == "cache_bytes":
            axis.set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def program(config: Any, study: Study) -> None:
    """Measures the missing cases; writes the table and the picture."""
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), JAX {jax.__version__}", flush=True)
    rows = study.measure(groups(config), measure)
    study.write_table(HEADER, table(rows))
    study.write_picture(picture(rows), "throughput")


if __name__ == "__main__":
    run(program, KEYS)
