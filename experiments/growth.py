"""Times a block's token against the sequence length.

    python -m experiments.growth [--lengths=4096,65536 --rules=SSD,GatedDeltaNet --picture=FILE]
    python -m experiments.growth --operation [--lengths=8192]
    python -m experiments.growth --errors=4096 [--rules=DeltaNet,GatedDeltaNet,RWKV7,KDA,GDN2]
    python -m experiments.growth --starts=16,32,64 [--rules=GatedDeltaNet --lengths=2048]

A block is a mixer and its MLP; what is timed is the gradient of all its parameters and its input.
For each rule at each length: the rule alone, GRM over ``Logarithmic`` segments, and SSC over
``Constant`` ones. Then two ratios: of ``Logarithmic`` to the rule alone at one length, and of the
longest sequence to the shortest with SSC. All programs are compiled first and timed in turn, so
that noise affects them alike; times are the least of the rounds, since other work only adds.
Memory is that of the compiled program: arguments, results and temporaries.

With ``--operation`` only ``mc.memory_caching`` is timed, on the arrays that the mixer makes.

With ``--errors`` nothing is timed: it prints how far composed runs, and tokens written in turn, are
from float64 after any number of so many segments of four tokens.

With ``--starts`` it times how memories write that carry their state from segment to segment, with
chunks of so many tokens and heads of 8 to 64: chunk after chunk, and with all chunks' maps at once.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments._operation import operation
from experiments._program import define_integers, run

FLAGS = flags.FLAGS
define_integers("lengths", [4096, 65536], "Tokens of a sequence, the shortest first.")
flags.DEFINE_list("rules", ["SSD", "GatedDeltaNet"], "Write rules, of mc.memories.")
flags.DEFINE_integer("features", 256, "Model dimension d.", 1)
flags.DEFINE_integer("heads", 4, "Heads h.", 1)
flags.DEFINE_integer("segment", 256, "Segment size C.", 1)
flags.DEFINE_integer("top_k", 4, "States that a token reads with SSC.", 1)
flags.DEFINE_integer("rounds", 5, "Timed rounds.", 1)
flags.DEFINE_integer("errors", None, "Segments whose runs are composed, to print the errors.", 1)
flags.DEFINE_bool("operation", False, "Time the memory's operation alone.")
define_integers("starts", None, "Tokens of a chunk, to time how states are carried.")
flags.DEFINE_string("json", None, "File to write the table to.")
flags.DEFINE_string("picture", None, "File to draw the times to, such as growth.png.")

ALONE, LOGARITHMIC, ROUTED = "alone", "Logarithmic + GRM", "Constant + SSC"


def mixers(rule: Any) -> dict[str, Any]:
    """Returns the mixers of a rule, by name."""
    import memcache_jax as mc

    def mixer(aggregation: Any, segmentation: Any) -> Any:
        return mc.nn.MemoryCachingMixer(rule, aggregation, segmentation)

    return {
        ALONE: mixer(mc.Residual(), mc.Constant(2**30)),
        LOGARITHMIC: mixer(mc.GRM(), mc.Logarithmic(FLAGS.segment)),
        ROUTED: mixer(mc.SSC(top_k=FLAGS.top_k), mc.Constant(FLAGS.segment)),
    }


def gradient(mixer: Any, length: int) -> tuple[Callable, tuple]:
    """Returns the function to time for a block or an operation, and its arguments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import memcache_jax as mc
    from memcache_jax.nn.block import Block

    x = jax.random.normal(jax.random.key(1), (1, length, FLAGS.features))
    if FLAGS.operation:
        return operation(mixer.build(FLAGS.features, FLAGS.heads, rngs=nnx.Rngs(0)), x)
    config = mc.nn.LanguageModelConfig(
        vocab_size=2,
        num_layers=1,
        features=FLAGS.features,
        num_heads=FLAGS.heads,
        mixers=(mixer,),
    )
    (((block,), _),) = config.stacks
    graph, params = nnx.split(Block(config, block, rngs=nnx.Rngs(0)))

    def loss(params: Any, x: Any) -> Any:
        y: Any = nnx.merge(graph, params)(x)
        return jnp.mean(y**2)

    return jax.grad(loss, (0, 1)), (params, x)


def rules() -> dict[str, Any]:
    """Returns the chosen rules, by name.

    Raises:
      ValueError: for a name that is no rule's.
    """
    import memcache_jax as mc

    for rule in FLAGS.rules:
        if rule not in mc.memories.__all__:
            raise ValueError(f"--rules must be of {mc.memories.__all__}, got {rule}")
    return {rule: getattr(mc.memories, rule)() for rule in FLAGS.rules}


def print_errors() -> None:
    """Prints the errors of composed runs and of tokens written in turn.

    Raises:
      ValueError: for a rule whose runs do not compose.
    """
    from experiments._composed import errors

    chosen = rules()
    if apart := [
        name for name, rule in chosen.items() if not (rule.form == "affine" and rule.merges)
    ]:
        raise ValueError(f"--errors needs rules whose runs compose, got {apart}")
    print(f"{'rule':16} {'composed':>9} {'in turn':>9}")
    for name, rule in chosen.items():
        composed, in_turn = errors(rule, FLAGS.errors)
        print(f"{name:16} {composed:9.1e} {in_turn:9.1e}", flush=True)


def print_starts() -> None:
    """Prints processor times of states that are carried from segment to segment.

    Raises:
      ValueError: for a rule that is not affine.
    """
    from experiments._starts import lines

    chosen, (length, *_) = rules(), FLAGS.lengths
    if apart := [name for name, rule in chosen.items() if rule.form != "affine"]:
        raise ValueError(f"--starts needs affine rules, got {apart}")
    sizes = dict(length=int(length), heads=FLAGS.heads, rounds=FLAGS.rounds)
    for line in lines(chosen, map(int, FLAGS.starts), **sizes):
        print(line, flush=True)


def program() -> None:
    """Compiles all programs, times them in turn, and prints the table and the ratios."""
    if FLAGS.errors is not None:
        print_errors()
        return
    if FLAGS.starts is not None:
        print_starts()
        return
    import jax

    from experiments._memory import memory_of

    lengths = [int(length) for length in FLAGS.lengths]
    jobs, peaks = {}, {}
    for rule, memory in rules().items():
        for name, mixer in mixers(memory).items():
            for length in lengths:
                function, arguments = gradient(mixer, length)
                compiled = jax.jit(function).lower(*arguments).compile()
                jobs[rule, name, length] = compiled, arguments
                peaks[rule, name, length] = memory_of(compiled)["peak_bytes"]

    seconds = dict.fromkeys(jobs, float("inf"))
    for warm in [True] + [False] * FLAGS.rounds:
        for job, (function, arguments) in jobs.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if not warm:
                seconds[job] = min(seconds[job], time.perf_counter() - begin)

    device = jax.devices()[0]
    print(
        f"{device.platform} ({device.device_kind}), d={FLAGS.features}, {FLAGS.heads} heads, "
        f"C={FLAGS.segment}, k={FLAGS.top_k}, one row, float32, gradient of "
        f"{'the operation' if FLAGS.operation else 'a block'}\n"
    )
    print(f"{'rule':16} {'mixer':18} {'T':>8} {'us/token':>9} {'MiB':>8}")
    table = []
    for (rule, name, length), best in seconds.items():
        row = dict(rule=rule, mixer=name, length=length, us_per_token=best / length * 1e6)
        row["mib"] = peaks[rule, name, length] / 2**20
        table.append(row)
        print(f"{rule:16} {name:18} {length:8} {row['us_per_token']:9.2f} {row['mib']:8.0f}")
    print()
    ratios = {}
    for rule in FLAGS.rules:
        for length in lengths:
            ratio = seconds[rule, LOGARITHMIC, length] / seconds[rule, ALONE, length]
            ratios[f"{rule}, T = {length}: {LOGARITHMIC} / {ALONE}"] = ratio
        short, long = lengths[0], lengths[-1]
        ratio = seconds[rule, ROUTED, long] / long / (seconds[rule, ROUTED, short] / short)
        ratios[f"{rule}: {ROUTED} at {long} / at {short}, per token"] = ratio
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    if FLAGS.json:
        with open(FLAGS.json, "w") as file:
            json.dump(dict(rows=table, ratios=ratios), file, indent=2)
    if FLAGS.picture:
        from experiments._growth_picture import picture

        picture(table).savefig(FLAGS.picture, dpi=120)


if __name__ == "__main__":
    run(program)
