"""Times the layer, forward and backward, and compares it to the machine's matmul rate.

    python -m experiments.bench_layer [--only=Titans+GRM,LinearAttention --length=1024]

Compiling every rule with every aggregation takes a while; ``--only`` selects some of them. The rows
"operation" time ``mc.memory_caching`` alone, forward and backward on the layer's own arrays,
without projections, convolutions and norms.

``--losses=32768,151936 --length=2048 --batch=4`` compares train steps instead, for vocabularies of
these sizes: the loss from all logits, and ``mc.nn.cross_entropy``, which holds a piece of them.

On a CPU, the program runs on one core (``--cores``) and lets the C library keep freed memory
(``--keep_memory``). Otherwise the kernel clears every page again for the next pass, and a layer as
small as linear attention takes 1.5 times as long. Times are medians of interleaved rounds, so
that noise affects all rows alike. FLOPs are those of the matrix products in the traced program,
with loop bodies counted once per trip; "x matmul" is the time divided by the time of the same FLOPs
at the rate of a large float32 matmul, measured in the same rounds.
"""

import json
import os
import statistics
import time
from collections.abc import Callable

from absl import app, flags

from experiments._memory import keep_freed_memory
from experiments._operation import operation
from experiments._program import define_integers, run

FLAGS = flags.FLAGS
flags.DEFINE_list("only", None, "Parts of the names of layers to time, such as Titans+GRM.")
flags.DEFINE_integer("length", 1024, "Tokens T.", 1)
flags.DEFINE_integer("features", 256, "Model dimension d.", 1)
flags.DEFINE_integer("heads", 4, "Heads h.", 1)
flags.DEFINE_integer("segment", 128, "Segment size C.", 1)
flags.DEFINE_integer("chunk", 32, "Chunk size m of deep memories.", 1)
flags.DEFINE_integer("batch", 1, "Sequences.", 1)
flags.DEFINE_integer("rounds", 15, "Timed rounds.", 1)
flags.DEFINE_integer("cores", 1, "CPU cores to run on; 0 for all.", 0)
flags.DEFINE_bool("keep_memory", True, "Keep freed memory in the process (glibc only).")
flags.DEFINE_enum("start", "independent", ["independent", "checkpoint"], "Start of a segment.")
flags.DEFINE_enum("segmentation", "constant", ["constant", "logarithmic"], "Segmentation.")
define_integers("losses", None, "Vocabularies of train steps to compare, instead of layers.")
flags.DEFINE_bool("run", True, "Run the train steps of --losses; or compile them alone.")
flags.DEFINE_string("json", None, "File to write the table to.")


def layers() -> dict[str, Callable]:
    """Returns functions that build the layers to time, by name."""
    from flax import nnx

    import memcache_jax as mc

    size, heads = FLAGS.features, FLAGS.heads
    rules = mc.memories
    memories = [
        *(rules.LinearAttention(), rules.RetNet(), rules.SSD(), rules.SWLA(), rules.GLA()),
        *(rules.DeltaNet(), rules.GatedDeltaNet(), rules.RWKV7(), rules.KDA(), rules.GDN2()),
        *(rules.DLA(FLAGS.chunk), rules.Titans(FLAGS.chunk), rules.Vector()),
    ]
    memories = {type(memory).__name__: memory for memory in memories}
    memories["Titans depth 1"] = rules.Titans(FLAGS.chunk, depth=1)
    aggregations = {kind.__name__: kind() for kind in (mc.Residual, mc.GRM, mc.Soup, mc.SSC)}
    aggregations["SSC soup"] = mc.SSC(inner="soup")
    kinds = dict(constant=mc.Constant, logarithmic=mc.Logarithmic)
    segmentation = kinds[FLAGS.segmentation](FLAGS.segment)

    def caching(memory, aggregation):
        return lambda: mc.nn.MemoryCaching(
            size,
            heads,
            memory=memory,
            aggregation=aggregation,
            segmentation=segmentation,
            start=FLAGS.start,
            rngs=nnx.Rngs(0),
        )

    rows: dict[str, Callable] = {
        f"{name} + {kind}": caching(memory, aggregation)
        for name, memory in memories.items()
        for kind, aggregation in aggregations.items()
    }
    rows["causal attention"] = lambda: mc.nn.Attention(size, heads, rngs=nnx.Rngs(0))
    return rows


def is_chosen(name: str) -> bool:
    """Whether to time a layer: all, or those whose names contain one of ``--only``."""
    short = name.replace(" ", "")
    return FLAGS.only is None or any(part.replace(" ", "") in short for part in FLAGS.only)


def programs(build: Callable) -> dict[str, tuple[Callable, tuple]]:
    """Returns the functions to time for a layer and its operation, with their arguments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import memcache_jax as mc

    layer = build()
    graph, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (FLAGS.batch, FLAGS.length, FLAGS.features))

    def forward(params, x):
        return nnx.merge(graph, params)(x)

    def loss(params, x):
        return jnp.sum(forward(params, x) ** 2)

    found = {"forward": (forward, (params, x)), "gradient": (jax.grad(loss, (0, 1)), (params, x))}
    if isinstance(layer, mc.nn.MemoryCaching):
        found["operation"] = operation(layer, x)
    return found


def program() -> None:
    """Compiles what the flags ask for, times it in interleaved rounds, and prints the table."""
    kept = FLAGS.keep_memory and keep_freed_memory()
    if FLAGS.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-FLAGS.cores :])
    if FLAGS.losses is not None:
        compare_losses()
    else:
        compare_layers(kept)


def compare_layers(kept: bool) -> None:
    """Prints the times of layers.

    Args:
      kept: whether the process keeps freed memory.
    """
    import jax

    from experiments._flops import count_flops

    square = jax.random.normal(jax.random.key(0), (1024, 1024))
    jobs: dict[tuple[str, str], tuple[Callable, tuple]] = {
        ("matmul 1024", "forward"): (jax.jit(lambda a: a @ a), (square,))
    }
    flops = {("matmul 1024", "forward"): 2 * 1024**3}
    compile_seconds = {}
    chosen = {n: build for n, build in layers().items() if is_chosen(n)}
    if not chosen:
        raise app.UsageError(f"--only={FLAGS.only} matches none of {list(layers())}")
    for name, build in chosen.items():
        for kind, (function, arguments) in programs(build).items():
            begin = time.perf_counter()
            jobs[name, kind] = jax.jit(function).lower(*arguments).compile(), arguments
            compile_seconds[name, kind] = time.perf_counter() - begin
            flops[name, kind] = count_flops(function, *arguments)

    seconds = {job: [] for job in jobs}
    for warm in [True] + [False] * FLAGS.rounds:
        for job, (function, arguments) in jobs.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if not warm:
                seconds[job].append(time.perf_counter() - begin)
    median = {job: statistics.median(times) for job, times in seconds.items()}
    rate = 2 * 1024**3 / median.pop(("matmul 1024", "forward"))

    device = jax.devices()[0]
    print(
        f"{device.platform} ({device.device_kind}), T={FLAGS.length}, d={FLAGS.features}, "
        f"{FLAGS.heads} heads, C={FLAGS.segment}, m={FLAGS.chunk}, batch {FLAGS.batch}, "
        f"{FLAGS.start} start, float32; freed memory {'is kept' if kept else 'goes back'}\n"
        f"float32 matmul, 1024 x 1024 x 1024: {rate / 1e9:.0f} GFLOP/s\n"
    )
    print(f"{'layer':30} {'pass':9} {'ms':>8} {'GFLOP':>7} {'x matmul':>9} {'compile s':>10}")
    table = []
    for name, kind in median:
        ideal = flops[name, kind] / rate
        row = dict(
            layer=name,
            kind=kind,
            ms=median[name, kind] * 1e3,
            gflop=flops[name, kind] / 1e9,
            times_matmul=median[name, kind] / ideal,
            compile_seconds=compile_seconds[name, kind],
        )
        table.append(row)
        print(
            f"{name:30} {kind:9} {row['ms']:8.1f} {row['gflop']:7.2f} "
            f"{row['times_matmul']:9.2f} {row['compile_seconds']:10.1f}"
        )
    print(
        "\ngradient: forward and backward, with respect to all parameters and the input;"
        "\noperation: the same for mc.memory_caching alone, with respect to all its arrays."
    )
    if FLAGS.json:
        with open(FLAGS.json, "w") as file:
            json.dump(dict(matmul_gflops=rate / 1e9, rows=table), file, indent=2)


def compare_losses() -> None:
    """Prints the memory and time of train steps with either loss."""
    from experiments._loss_steps import HEADER, compare

    print(HEADER)
    table = []
    for size in map(int, FLAGS.losses):
        sizes = dict(features=FLAGS.features, heads=FLAGS.heads, segment=FLAGS.segment)
        tokens, rounds = (FLAGS.batch, FLAGS.length), FLAGS.rounds if FLAGS.run else 0
        table += compare(size, tokens, rounds, **sizes)
    if FLAGS.json:
        with open(FLAGS.json, "w") as file:
            json.dump(table, file, indent=2)


if __name__ == "__main__":
    run(program)
