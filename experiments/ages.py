"""Asks a full cache for pairs of all ages, after a million tokens and without training.

    python -m experiments.ages --workdir=FOLDER [--length=1048576]

Streams random pairs of keys and values of norm one through caches with ``--slots`` states, one
cache for each policy. All keys of a segment share a topic, so that gates can tell segments apart.
Then it asks for pairs 1, 2, 4, 8, ... segments back, and measures the share of the other values of
the pair's segment that the read ranks below the right one: 1 is perfect, 0.5 is chance. Heads are
independent streams. The workdir gets ``ages.json`` and ``ages.md``.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import memcache_jax as mc
from experiments._capacity import rules
from experiments._program import run
from memcache_jax._typing import Array

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of the results.", required=True)
flags.DEFINE_integer("length", 1 << 20, "Pairs, a multiple of the piece.", 1)
flags.DEFINE_integer("piece", 1 << 12, "Pairs taken at once, a multiple of the segment.", 1)
flags.DEFINE_integer("segment", 64, "Segment size C.", 1)
flags.DEFINE_integer("slots", 32, "Cached states N.", 1)
flags.DEFINE_integer("dim", 32, "Dimension of keys and values.", 1)
flags.DEFINE_integer("heads", 2, "Independent streams.", 1)
flags.DEFINE_integer("questions", 512, "Questions per age and head.", 1)
flags.DEFINE_float("correlation", 0.5, "Mean product of two keys of a segment.", 0, 1)
flags.DEFINE_float("temperature", 10.0, "Connectors are the queries times this.", 0)
flags.DEFINE_list("rules", ["DeltaNet"], "Write rules.")
flags.DEFINE_list(
    "policies",
    ["drop_oldest", "merge", "merge_by_age", "compose_by_age"],
    "Policies of full caches.",
)


def pairs_of(segment: Array) -> tuple[Array, Array]:
    """The keys and values (C, heads, dim) of a segment, by its number."""
    shape = FLAGS.segment, FLAGS.heads, FLAGS.dim
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), segment), 3)
    topic, own = _normal(keys[0], (1, *shape[1:])), _normal(keys[1], shape)
    own = _unit(own - (own * topic).sum(-1, keepdims=True) * topic)
    rho = FLAGS.correlation
    return rho**0.5 * topic + (1 - rho) ** 0.5 * own, _normal(keys[2], shape)


def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return _unit(jax.random.normal(key, shape))


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def streamed(rule: str, policy: str) -> mc.Cache:
    """The cache after all pairs."""
    dim, memory = FLAGS.dim, rules()[rule].memory
    cache = mc.init_cache(
        *(1, FLAGS.heads, dim, dim),
        memory=memory,
        aggregation=mc.GRM(),
        segmentation=mc.Constant(FLAGS.segment),
        max_segments=FLAGS.slots,
        policy=policy,
    )
    count = FLAGS.piece // FLAGS.segment

    def take(cache: mc.Cache, piece: Array) -> tuple[mc.Cache, None]:
        key, value = jax.vmap(pairs_of)(piece * count + jnp.arange(count))
        key, value = (x.reshape(1, -1, *x.shape[2:]) for x in (key, value))
        controls = rules()[rule].coefficients(key)
        return mc.extend(cache, key, key, value, key, controls=controls)[1], None

    pieces = jnp.arange(FLAGS.length // FLAGS.piece)
    return jax.jit(lambda cache: jax.lax.scan(take, cache, pieces)[0])(cache)


def ranks(rule: str, cache: mc.Cache) -> list[float]:
    """The share of the segment's other values ranked below the right one, for each age."""
    segments, made = FLAGS.length // FLAGS.segment, []

    @jax.jit
    def share(cache: mc.Cache, segment: Array, token: Array) -> Array:
        keys, values = jax.vmap(pairs_of)(segment)  # (questions, C, heads, dim)
        key = keys[jnp.arange(len(token)), token][:, None]
        # A key of zero writes nothing, and adds nothing to the live memory's pooled key.
        nothing = jnp.zeros_like(key)
        asked = key, nothing, nothing, FLAGS.temperature * key
        controls = rules()[rule].coefficients(nothing[:1])

        def ask(rows: tuple[Array, ...]) -> Array:
            return mc.extend(cache, *(x[None] for x in rows), controls=controls)[0][0, 0]

        near = jnp.einsum("qhv,qthv->qht", jax.lax.map(ask, asked), values)
        right = near[jnp.arange(len(token)), :, token]
        return jnp.mean(jnp.sum(near < right[..., None], axis=-1) / (FLAGS.segment - 1))

    for age in ages():
        random = np.random.default_rng(age)
        # Pairs of segments more than age / 2 and at most age back.
        back = random.integers(age // 2 + 1, age + 1, FLAGS.questions)
        token = random.integers(0, FLAGS.segment, FLAGS.questions)
        made.append(float(share(cache, segments - back, token)))
    return made


def ages() -> list[int]:
    """The ages to ask for, in segments."""
    return [1 << i for i in range((FLAGS.length // FLAGS.segment).bit_length())]


def program() -> None:
    """Measures all policies, then writes the results and a table."""
    if FLAGS.length % FLAGS.piece or FLAGS.piece % FLAGS.segment:
        raise ValueError(
            "segment must divide piece, and piece length, got "
            f"{FLAGS.segment}, {FLAGS.piece} and {FLAGS.length}"
        )
    unknown = sorted({*FLAGS.rules} - rules().keys())
    if unknown:
        raise ValueError(f"rules must be of {', '.join(rules())}, got {', '.join(unknown)}")
    workdir, rows = Path(FLAGS.workdir), []
    workdir.mkdir(parents=True, exist_ok=True)
    lines = [" | ".join(("| rule, policy", "KiB", *(f"{age:,}" for age in ages()))) + " |"]
    lines.append("|---" * (len(ages()) + 2) + "|")
    print(*lines, sep="\n", flush=True)
    for rule in FLAGS.rules:
        for policy in FLAGS.policies:
            cache = streamed(rule, policy)
            rank = ranks(rule, cache)
            kib = cache.nbytes / 1024 / FLAGS.heads  # of a head
            rows.append(dict(rule=rule, policy=policy, kib=kib, ages=ages(), rank=rank))
            numbers = [f"{x:.2f}" for x in rank]
            lines.append(" | ".join((f"| {rule}, {policy}", f"{kib:.0f}", *numbers)) + " |")
            print(lines[-1], flush=True)
    (workdir / "ages.json").write_text(json.dumps(rows, indent=1))
    (workdir / "ages.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(program)
