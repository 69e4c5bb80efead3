"""Streams a million tokens through one cache: time per token and bytes by position.

    python -m experiments.stream --workdir=FOLDER [--length=1048576 --attention=32768]

Runs two small models with memory caching, one with a router's top-k over equal segments (SSC) and
one with logarithmic buckets, and a Transformer with a KV cache up to ``--attention`` tokens. The
history is random bytes, taken in long pieces. At powers of two, it times the next tokens one by one
and takes the median of ``--rounds``. A cache's arrays have their full size from the start; "made
for" is the step of a cache sized for that position only, after as many tokens. Both alternate with
the step of the cache sized for the first position, and the ratios to it are robust to changes in
the machine's speed. Memory is the process's peak resident set since the previous position, with
programs and all caches (Linux only). Nothing is trained: time and bytes do not depend on the
parameters.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

import memcache_jax as mc
from experiments._program import run

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of the results.", required=True)
flags.DEFINE_integer("length", 1 << 20, "Tokens of history.", 1)
flags.DEFINE_integer("attention", 1 << 15, "Tokens of history for the Transformer.", 1)
flags.DEFINE_integer("first", 1 << 12, "Tokens of history at the first measurement.", 1)
flags.DEFINE_integer("features", 128, "Model dimension d.", 1)
flags.DEFINE_integer("heads", 4, "Heads h.", 1)
flags.DEFINE_integer("layers", 1, "Layers.", 1)
flags.DEFINE_integer("segment", 256, "Segment size C.", 1)
flags.DEFINE_integer("piece", 2048, "Tokens of history taken at once.", 1)
flags.DEFINE_integer("rounds", 100, "Timed tokens at each position.", 1)


def mixers() -> dict[str, Any]:
    """Returns the mixers to compare, by name."""
    memory = mc.memories.GatedDeltaNet()
    return {
        "SSC": mc.nn.MemoryCachingMixer(memory, mc.SSC(top_k=4), mc.Constant(FLAGS.segment)),
        "logarithmic": mc.nn.MemoryCachingMixer(memory, mc.GRM(), mc.Logarithmic(FLAGS.segment)),
        "attention": mc.nn.AttentionMixer(),
    }


def build(mixer: Any) -> mc.nn.LanguageModel:
    """Returns a language model over bytes."""
    return mc.nn.LanguageModel(
        mc.nn.LanguageModelConfig(
            vocab_size=257,
            num_layers=FLAGS.layers,
            features=FLAGS.features,
            num_heads=FLAGS.heads,
            mixers=(mixer,),
        ),
        rngs=nnx.Rngs(0),
    )


def positions(length: int) -> list[int]:
    """Returns the measured positions: powers of two, and the length itself."""
    every = [FLAGS.first << i for i in range(64) if FLAGS.first << i < length]
    return [*every, length]


class Stream:
    """A model and its cache."""

    def __init__(self, model: mc.nn.LanguageModel, length: int) -> None:
        graph, self.state = nnx.split(model)
        # With room for the tokens timed at each position.
        self.cache = model.init_cache(1, length + FLAGS.rounds * (len(positions(length)) + 1))

        def extend(
            state: Any, tokens: jax.Array, cache: Any, lengths: jax.Array | None
        ) -> tuple[jax.Array, Any]:
            model = nnx.merge(graph, state)
            hidden, cache = model.extend(tokens, cache, lengths)
            return model.logits(hidden[:, -1]), cache

        self.step = jax.jit(extend, donate_argnums=2)
        self.position = 0

    def take(self, count: int) -> float:
        """Takes ``count`` random tokens, at most a piece, and returns the seconds."""
        # One program for pieces of any length.
        size, lengths = (1, None) if count == 1 else (FLAGS.piece, jnp.array([count]))
        tokens = jax.random.randint(jax.random.key(count), (1, size), 0, 256)
        begin = time.perf_counter()
        logits, self.cache = self.step(self.state, tokens, self.cache, lengths)
        logits.block_until_ready()
        self.position += count
        return time.perf_counter() - begin

    def take_until(self, position: int) -> None:
        """Takes random tokens in pieces."""
        while self.position < position:
            self.take(min(FLAGS.piece, position - self.position))


def token_times(*streams: Stream) -> list[float]:
    """Returns the median milliseconds of each stream's next token; streams take turns."""
    rounds = [[stream.take(1) for stream in streams] for _ in range(FLAGS.rounds)]
    return [1e3 * statistics.median(times) for times in zip(*rounds, strict=True)]


def forget_peak() -> bool:
    """Resets the peak resident set; returns whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Returns the peak resident set since ``forget_peak``, or None if unknown."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.removeprefix("VmHWM:").removesuffix("kB"))
    return None


def measure(name: str, mixer: Any, length: int) -> list[dict[str, Any]]:
    """Measures time per token and bytes at each position."""
    model, rows = build(mixer), []
    stream, *fitted = (Stream(model, room) for room in (length, *positions(length)))
    for one in (stream, *fitted):
        one.take(1)  # compiles
    stream.take(min(2, FLAGS.piece))
    begin = time.perf_counter()
    for wanted, own in zip(positions(length), fitted, strict=True):
        knows_peak = forget_peak()
        stream.take_until(wanted)
        peak = peak_bytes() if knows_peak else None
        own.take_until(wanted)
        in_time, made_for, first = token_times(stream, own, fitted[0])
        row: dict[str, Any] = dict(
            model=name,
            position=wanted,
            ms_per_token=in_time,
            ms_made_for=made_for,
            ms_made_for_first=first,
            bytes=stream.cache.nbytes,
            bytes_made_for=own.cache.nbytes,
            peak_bytes=peak,
        )
        rows.append(row)
        resident = "" if peak is None else f", {peak / 1e6:,.0f} MB resident"
        print(
            f"{name:<12} {wanted:>9,} tokens  {in_time:7.3f} ms/token ({in_time / first:.2f} x)  "
            f"made for {made_for:7.3f} ms ({made_for / first:.2f} x), "
            f"{row['bytes_made_for'] / 1e6:8.1f} MB{resident}",
            flush=True,
        )
    print(f"{name}: {time.perf_counter() - begin:.0f} s, {stream.cache.nbytes / 1e6:.1f} MB")
    print(mc.nn.cache_table(model, stream.cache, length), end="\n\n")
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots time and bytes by position."""
    from memcache_jax.training.pictures import look, new_figure

    lines = {
        "milliseconds per token": {
            "": ("ms_per_token", 1.0),
            ", cache made for this length": ("ms_made_for", 1.0),
        },
        "megabytes": {
            "": ("bytes", 1e-6),
            ", cache made for this length": ("bytes_made_for", 1e-6),
            ", resident": ("peak_bytes", 1e-6),
        },
    }
    figure, (axes,) = new_figure(2, size=(6, 4))
    names = dict.fromkeys(row["model"] for row in rows)
    for axis, (title, keys) in zip(axes, lines.items(), strict=True):
        for place, name in enumerate(names):
            mine = [row for row in rows if row["model"] == name]
            for line, (label, (key, scale)) in enumerate(keys.items()):
                known = [row for row in mine if row[key] is not None]
                x, y = [row["position"] for row in known], [row[key] * scale for row in known]
                how = look(place) | dict(linestyle=("-", ":", "--")[line])
                axis.plot(x, y, **how, label=name + label)
        axis.set(xscale="log", yscale="log", xlabel="tokens of history", ylabel=title)
    handles = axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)


def program() -> None:
    """Measures the models, then writes stream.json and stream.png."""
    workdir = Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, mixer in mixers().items():
        length = FLAGS.attention if name == "attention" else FLAGS.length
        rows += measure(name, mixer, length)
    (workdir / "stream.json").write_text(json.dumps(rows, indent=1))
    plot(rows, workdir / "stream.png")
    for name in mixers():
        last = [row for row in rows if row["model"] == name][-1]
        one, other = (
            last[key] / last["ms_made_for_first"] for key in ("ms_per_token", "ms_made_for")
        )
        print(
            f"{name}: compared with a cache made for {FLAGS.first:,} tokens, the next token takes "
            f"{one:.2f} times as long after {last['position']:,} tokens, and {other:.2f} times as "
            "long in a cache made for that many"
        )
    print(f"written: {workdir / 'stream.json'}, {workdir / 'stream.png'}")


if __name__ == "__main__":
    run(program)
