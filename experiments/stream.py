"""A million tokens through one cache: time per token and bytes against the position.

    python -m experiments.stream --workdir=FOLDER [--length=1048576 --attention=32768]

Two small models with memory caching, one by a router's top-k over segments of one size and one with
logarithmic buckets, and a Transformer with a KV cache up to ``--attention`` tokens. The history is
random bytes taken in long pieces; at powers of two the next tokens are taken one by one and timed,
the median of ``--rounds``. A cache's arrays have their size from the start, so that a step costs
the same everywhere; "made for" beside each position is the step of a cache that is made for that
length and no more, empty still. Nothing is trained: neither time nor bytes depend on the
parameters.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from flax import nnx

import memcache_jax as mc

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Where the figures and the picture go.", required=True)
flags.DEFINE_integer("length", 1 << 20, "Tokens of history.")
flags.DEFINE_integer("attention", 1 << 15, "Tokens of history for the Transformer.")
flags.DEFINE_integer("first", 1 << 12, "Tokens of history at the first measurement.")
flags.DEFINE_integer("features", 128, "Model dimension d.")
flags.DEFINE_integer("heads", 4, "Heads h.")
flags.DEFINE_integer("layers", 1, "Layers.")
flags.DEFINE_integer("segment", 256, "Segment size C.")
flags.DEFINE_integer("piece", 2048, "Tokens of history taken at once.")
flags.DEFINE_integer("rounds", 50, "Timed tokens at each position.")


def mixers() -> dict[str, Any]:
    """The mixers to compare, by name."""
    memory = mc.memories.GatedDeltaNet()
    return {
        "SSC": mc.nn.MemoryCachingMixer(memory, mc.SSC(top_k=4), mc.Constant(FLAGS.segment)),
        "logarithmic": mc.nn.MemoryCachingMixer(memory, mc.GRM(), mc.Logarithmic(FLAGS.segment)),
        "attention": mc.nn.AttentionMixer(),
    }


def build(mixer: Any) -> mc.nn.LanguageModel:
    """A language model over bytes."""
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
    """Powers of two, and the length itself."""
    every = [FLAGS.first << i for i in range(64) if FLAGS.first << i < length]
    return [*every, length]


class Stream:
    """A model and its cache."""

    def __init__(self, model: mc.nn.LanguageModel, length: int) -> None:
        graph, self.state = nnx.split(model)
        # Room for the tokens that are timed at each position.
        self.cache = model.init_cache(1, length + FLAGS.rounds * (len(positions(length)) + 1))

        def extend(state: Any, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graph, state)
            hidden, cache = model.extend(tokens, cache)
            return model.logits(hidden[:, -1]), cache

        self.step = jax.jit(extend, donate_argnums=2)
        self.position = 0

    def take(self, count: int) -> float:
        """Takes so many random tokens, and returns the seconds."""
        tokens = jax.random.randint(jax.random.key(count), (1, count), 0, 256)
        begin = time.perf_counter()
        logits, self.cache = self.step(self.state, tokens, self.cache)
        logits.block_until_ready()
        self.position += count
        return time.perf_counter() - begin

    def token_time(self) -> float:
        """Milliseconds of the next token, the median."""
        return 1e3 * statistics.median(self.take(1) for _ in range(FLAGS.rounds))


def measure(name: str, mixer: Any, length: int) -> list[dict[str, Any]]:
    """Rows of position, milliseconds per token and bytes."""
    model = build(mixer)
    stream, rows = Stream(model, length), []
    stream.take(1)  # compiles
    begin = time.perf_counter()
    for wanted in positions(length):
        while stream.position < wanted:
            stream.take(min(FLAGS.piece, wanted - stream.position))
        in_time = stream.token_time()
        fitted = Stream(model, wanted)
        fitted.take(1)
        row: dict[str, Any] = dict(
            model=name,
            position=wanted,
            ms_per_token=in_time,
            ms_made_for=fitted.token_time(),
            bytes=stream.cache.nbytes,
            bytes_made_for=fitted.cache.nbytes,
        )
        rows.append(row)
        print(
            f"{name:<12} {wanted:>9,} tokens  {in_time:7.3f} ms/token  made for "
            f"{row['ms_made_for']:7.3f} ms, {row['bytes_made_for'] / 1e6:8.1f} MB",
            flush=True,
        )
    print(f"{name}: {time.perf_counter() - begin:.0f} s, {stream.cache.nbytes / 1e6:.1f} MB")
    print(mc.nn.cache_table(model, stream.cache, length), end="\n\n")
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws time and bytes against the position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = dict.fromkeys(row["model"] for row in rows)
    for axis, what, scale in ((axes[0], "ms", 1.0), (axes[1], "bytes", 1e-6)):
        for color, name in enumerate(names):
            mine = [row for row in rows if row["model"] == name]
            x = [row["position"] for row in mine]
            one = "ms_per_token" if what == "ms" else "bytes"
            for key, style in ((one, "-o"), (f"{what}_made_for", ":")):
                y = [row[key] * scale for row in mine]
                label = name if style == "-o" else f"{name}, cache made for this length"
                axis.plot(x, y, style, color=f"C{color}", label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens of history")
    axes[0].set_ylabel("milliseconds per token")
    axes[1].set_ylabel("megabytes of cache")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(_: list[str]) -> None:
    """Measures, prints, and writes stream.json and stream.png."""
    for name in ("length", "attention", "first", "piece", "rounds"):
        if getattr(FLAGS, name) < 1:
            raise app.UsageError(f"--{name} must be at least 1, got {getattr(FLAGS, name)}")
    workdir = Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, mixer in mixers().items():
        length = FLAGS.attention if name == "attention" else FLAGS.length
        rows += measure(name, mixer, length)
    (workdir / "stream.json").write_text(json.dumps(rows, indent=1))
    plot(rows, workdir / "stream.png")
    for name in mixers():
        mine = [row["ms_per_token"] for row in rows if row["model"] == name]
        print(f"{name}: the last is {mine[-1] / mine[0]:.2f} times the first")
    print(f"written: {workdir / 'stream.json'}, {workdir / 'stream.png'}")


if __name__ == "__main__":
    app.run(main)
