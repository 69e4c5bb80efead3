"""Train steps of one model with two losses: from all logits at once, and from pieces of them."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import memcache_jax as mc
from experiments._memory import memory_of
from memcache_jax.training import default_config
from memcache_jax.training.optimizer import make_optimizer
from memcache_jax.training.step import abstract_state, create_state, make_train_step

HEADER = f"{'loss':12} {'words':>8} {'GiB':>7} {'ms':>9} {'CPU ms':>9} {'compile s':>10}"


class FromLogits(mc.nn.LanguageModel):
    """A language model whose loss holds the logits of all tokens."""

    def cross_entropy(
        self, hidden: Any, targets: Any, weights: Any = None, *, z_loss: float = 0.0
    ) -> mc.nn.CrossEntropy:
        """Returns the plain loss."""
        logits = self.logits(hidden)
        log_partition = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = log_partition - target
        weights = jnp.ones_like(loss) if weights is None else weights
        total = jnp.sum(weights * (loss + z_loss * log_partition**2))
        return mc.nn.CrossEntropy(total, -loss, log_partition)


def compare(
    vocab_size: int,
    tokens: tuple[int, int],
    rounds: int,
    *,
    features: int,
    heads: int,
    segment: int,
) -> list[dict[str, Any]]:
    """Prints, and returns, what both steps need.

    The model has two layers of linear attention and GRM, whose activations the backward pass
    recomputes.

    Args:
      vocab_size: words.
      tokens: rows and tokens of each.
      rounds: timed steps of each, in turn; 0 to compile alone.
      features: model dimension d.
      heads: heads h.
      segment: segment size C.
    """
    mixer = mc.nn.MemoryCachingMixer(mc.memories.LinearAttention(), mc.GRM(), mc.Constant(segment))
    shape: dict[str, Any] = dict(features=features, num_heads=heads, remat=True)
    config = mc.nn.LanguageModelConfig(vocab_size, 2, mixers=(mixer,), **shape)
    optimizer = make_optimizer(default_config().optimizer, 1000)
    graph, target = abstract_state(config, optimizer)
    whole = jax.eval_shape(lambda: nnx.split(FromLogits(config, rngs=nnx.Rngs(0)), nnx.Param))[0]
    batch = jax.random.randint(jax.random.key(0), (tokens[0], tokens[1] + 1), 0, vocab_size)
    found, steps = [], []
    for name, of in (("all logits", whole), ("in pieces", graph)):
        begin = time.perf_counter()
        update: Any = make_train_step(of, optimizer)
        compiled: Any = update.lower(target, batch).compile()
        row = dict(loss=name, words=vocab_size, compile_seconds=time.perf_counter() - begin)
        found.append(row | memory_of(compiled))
        steps.append(compiled)
    if rounds:
        times = _timed(steps, config, optimizer, batch, rounds)
        for row, (clock, processor) in zip(found, times, strict=True):
            row["ms"], row["cpu_ms"] = map(statistics.median, (clock, processor))
    for row in found:
        times = " ".join(
            f"{row[kind]:9,.0f}" if rounds else f"{'-':>9}" for kind in ("ms", "cpu_ms")
        )
        print(
            f"{row['loss']:12} {vocab_size:8,} {row['temporary_bytes'] / 2**30:7.3f} {times} "
            f"{row['compile_seconds']:10.1f}",
            flush=True,
        )
    return found


def _timed(
    steps: list, config: Any, optimizer: Any, batch: Any, rounds: int
) -> list[tuple[list[float], list[float]]]:
    """The milliseconds of each step's rounds, by the clock and of the processor."""
    state = create_state(config, optimizer, 0)
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in steps]
    for warm in [True] + [False] * rounds:
        for step, (clock, processor) in zip(steps, times, strict=True):
            begin, used = time.perf_counter(), time.process_time()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            if not warm:
                clock.append(1e3 * (time.perf_counter() - begin))
                processor.append(1e3 * (time.process_time() - used))
    return times
