"""The combinations that the shared tests run over: a new rule or variant is listed here once."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.aggregation import Aggregation


def rule_of_the_docs() -> Any:
    """The rule that docs/write_your_own_memory.md adds, as the page has it."""
    page = pathlib.Path(__file__).parents[1] / "docs/write_your_own_memory.md"
    _, code, *_ = page.read_text().split("```python\n")
    names: dict[str, Any] = {}
    exec(compile(code.split("```")[0], page, "exec"), names)
    return names["Erasing"]()


MEMORIES = {
    "linear": mc.memories.LinearAttention(),
    "retnet": mc.memories.RetNet(),
    "ssd": mc.memories.SSD(),
    "swla": mc.memories.SWLA(),
    "gla": mc.memories.GLA(),
    "deltanet": mc.memories.DeltaNet(),
    "gated_deltanet": mc.memories.GatedDeltaNet(),
    "rwkv7": mc.memories.RWKV7(),
    "kda": mc.memories.KDA(),
    "gdn2": mc.memories.GDN2(),
    "dla": mc.memories.DLA(chunk_size=4, expansion=2),
    "titans": mc.memories.Titans(chunk_size=4, expansion=2),
    "titans_depth1": mc.memories.Titans(chunk_size=4, depth=1),
    "vector": mc.memories.Vector(),
    "erasing": rule_of_the_docs(),
}
# One of each family, for what the rule has little part in.
FAMILIES = {name: MEMORIES[name] for name in ("linear", "gated_deltanet", "titans")}
# Every form; constants of heads, controls of channels of keys and of values; states of one and of
# several arrays, with initial weights or none; and a user's rule: for what sees no more of a rule.
_COVER = "linear retnet swla gated_deltanet rwkv7 gdn2 titans vector erasing"
COVER = {name: MEMORIES[name] for name in _COVER.split()}
AGGREGATIONS = {
    "residual": mc.Residual(),
    "grm": mc.GRM(),
    "soup": mc.Soup(),
    "ssc": mc.SSC(top_k=2),
}
# And what routes to parameters; the same as "ssc" for a matrix.
KINDS = AGGREGATIONS | {"ssc_soup": mc.SSC(top_k=2, inner="soup")}
SEGMENTATIONS = {"constant": mc.Constant, "logarithmic": mc.Logarithmic}
STARTS = ("independent", "checkpoint")
PLANS = tuple(itertools.product(SEGMENTATIONS, STARTS))
TWO_PLANS = (("constant", "checkpoint"), ("logarithmic", "independent"))  # each one once
# Units run in turn, as a CPU does, or side by side, as accelerators do.
SCHEDULES = {
    "in_turn": lambda *args, default, cpu=None, **others: (cpu or default)(*args),
    "side_by_side": lambda *args, default, **others: default(*args),
}

EVERY_PLATFORM = jax.lax.platform_dependent  # as the library imports it


def kinds_of(memory):
    """The aggregations; of matrices soups are computed as GRM is."""
    return {name: kind for name, kind in KINDS.items() if memory.depth > 1 or not kind.mixes}


def combine(aggregations=AGGREGATIONS, plans=PLANS):
    """These aggregations with these segmentations and starts, for ``run_all``."""
    return tuple((aggregation, *plan) for aggregation in aggregations for plan in plans)


CASES = combine()


def each_once(shift, aggregations=AGGREGATIONS):
    """Each aggregation once; four shifts give each of them every segmentation and start."""
    return tuple((kind, *PLANS[(i + shift) % 4]) for i, kind in enumerate(aggregations))


def slow_unless(fast):
    """Marks of a case that only the whole suite runs, unless it is a fast one."""
    return () if fast else pytest.mark.slow


def with_slow(cases, *fast):
    """Named cases for ``parametrize``, or names alone; all but these names are slow."""
    named = cases if isinstance(cases, dict) else {name: name for name in cases}
    return [pytest.param(x, id=name, marks=slow_unless(name in fast)) for name, x in named.items()]


def twice_each(shift, aggregations):
    """Each aggregation twice, with every segmentation and every start."""
    pairs = PLANS[::3], PLANS[1:3]
    return tuple(
        (kind, *plan) for i, kind in enumerate(aggregations) for plan in pairs[(i + shift) % 2]
    )


def unit(x):
    """Rows of norm one."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def normals(seed, dtype=None):
    """A function that draws arrays of a shape; JAX would compile one program for each shape."""
    draw = np.random.default_rng(seed).standard_normal
    return lambda *shape: draw(shape).astype(rows_dtype(dtype))


def make_inputs(memory, length, *, batch=2, heads=3, dim=4, value_dim=None, seed=0, dtype=None):
    """Random arguments of ``memory_caching`` for a memory, NumPy arrays in one dict."""
    normal = normals(seed, dtype)
    rows, value_dim = (batch, length, heads, dim), value_dim or dim
    sizes = dict(b=batch, t=length, h=heads, k=dim, v=value_dim)
    inputs: dict[str, Any] = dict(
        query=unit(normal(*rows)), key=unit(normal(*rows)), value=normal(*rows[:-1], value_dim)
    )
    inputs["connector"] = 3 * unit(normal(*rows))
    logits = {
        name: normal(*(sizes[axis] for axis in control.axes.split()))
        for name, control in memory.controls.items()
    }
    inputs["controls"] = jax.tree.map(np.array, _activate(memory, logits))
    inputs["weights"] = {
        name: normal(heads, *shape) / np.sqrt(shape[1], dtype=rows_dtype(dtype))
        for name, shape in memory.weight_shapes(dim, value_dim).items()
    }
    return inputs


@functools.partial(jax.jit, static_argnums=0)
def _activate(memory, logits):
    """Controls as a layer makes them from these logits."""
    return {
        name: control.scale * control.activation(logits[name])
        if control.per_head is None
        else control.per_head(len(logits[name])).astype(logits[name].dtype)
        for name, control in memory.controls.items()
    }


def rows_dtype(dtype):
    """The dtype that None stands for."""
    return dtype or jnp.zeros(()).dtype


def value_and_vjp(function, *arguments):
    """A function's value and its pullback of fixed cotangents, in one program."""

    @jax.jit
    def both(*arguments):
        value, pull = jax.vjp(function, *arguments)

        def cotangent(y):
            wide = jnp.arange(y.size, dtype=jnp.promote_types(y.dtype, jnp.float32))
            return jnp.cos(wide).reshape(y.shape).astype(y.dtype)

        return value, pull(jax.tree.map(cotangent, value))

    return both(*arguments)


@functools.partial(jax.jit, static_argnums=(1, 2), static_argnames=("size", "start", "schedule"))
def run(inputs, memory, aggregation, *, size=8, start: Any = "independent", schedule="in_turn"):
    """``memory_caching`` on the inputs of ``make_inputs``, by the fast path.

    With no schedule it is the one of the platform that the program is made for.
    """
    with scheduled(schedule):
        return mc.memory_caching(
            **inputs,
            memory=memory,
            aggregation=aggregation,
            segmentation=mc.Constant(size),
            start=start,
        )


@functools.partial(jax.jit, static_argnums=(1, 2), static_argnames=("size", "start"))
def run_reference(inputs, memory, aggregation, *, size=8, start: Any = "independent"):
    """The same, token by token."""
    return mc.memory_caching(
        **inputs,
        memory=memory,
        aggregation=aggregation,
        segmentation=mc.Constant(size),
        start=start,
        implementation="reference",
    )


@functools.partial(jax.jit, static_argnames=("memory", "size", "cases", "options"))
def run_all(inputs, memory, *, size=4, cases=CASES, options=(), document_ids=None):
    """Several (aggregation, segmentation, start) in one program, by name."""
    with scheduled("in_turn"):
        return {
            f"{aggregation}/{segmentation}/{start}": mc.memory_caching(
                **inputs,
                memory=memory,
                aggregation=KINDS[aggregation],
                segmentation=SEGMENTATIONS[segmentation](size),
                start=start,
                document_ids=document_ids,
                **dict(options),
            )
            for aggregation, segmentation, start in cases
        }


REFERENCE = (("implementation", "reference"),)


@dataclasses.dataclass(frozen=True)
class Together(Aggregation):
    """Several aggregations over one writing of a memory: the sum of their outputs, each scaled.

    Scales differ by aggregation and channel, so that none is another's.
    """

    kinds: tuple[Any, ...]
    gate = "content"

    def gates(self, cached, live):
        """The relevance itself: each aggregation makes its own of it."""
        return cached, live

    def needs(self, memory):
        return tuple({part for kind in self.kinds for part in kind.needs(memory)})

    def select(self, *args, **options) -> Any:
        return tuple(kind.select(*args, **options) for kind in self.kinds)

    def read(self, bank, live, query, selection) -> Any:
        return self.scaled(
            kind.read(bank, live, query, own)
            for kind, own in zip(self.kinds, selection, strict=True)
        )

    def read_token(self, memory, states, query, gates) -> Any:
        def own(kind):
            scores = gates if kind.gate == "content" else jnp.where(gates > -jnp.inf, 0, gates)
            return jnp.append(*kind.gates(scores[:-1], scores[-1]))

        return self.scaled(kind.read_token(memory, states, query, own(kind)) for kind in self.kinds)

    def scaled(self, outputs) -> Any:
        """The sum of the aggregations' outputs, each scaled."""
        return sum(
            y * jnp.cos(i + jnp.arange(y.shape[-1])).reshape(*[1] * (y.ndim - 1), -1)
            for i, y in enumerate(outputs)
        )


@contextlib.contextmanager
def scheduled(schedule):
    """What is traced meanwhile has this schedule alone, or one for every platform (for None)."""
    way = EVERY_PLATFORM if schedule is None else SCHEDULES[schedule]
    with mock.patch("jax.lax.platform_dependent", way):
        yield


def assert_close(got, wanted, tolerance, scale=None):
    """Asserts that all leaves agree to ``tolerance`` relative to each wanted leaf's largest."""

    def check(path, got, wanted):
        got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
        if wanted.size:
            reference = scale or max(np.max(np.abs(wanted)), 1e-30)
            error = np.max(np.abs(got - wanted)) / reference
            assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error} > {tolerance}"

    jax.tree_util.tree_map_with_path(check, got, wanted)


def assert_slopes(loss, inputs, gradients, normal, tolerance, directions=1):
    """Asserts that gradients of a loss are its slopes along random directions of each argument."""
    arguments, tree = jax.tree.flatten(inputs)
    of_each = enumerate(zip(arguments, jax.tree.leaves(gradients), strict=True))
    for (i, (x, gradient)), _ in itertools.product(of_each, range(directions)):
        direction = normal(*x.shape)

        def moved(distance, i=i, along=direction):
            others = [x + distance * along if i == j else x for j, x in enumerate(arguments)]
            return float(loss(jax.tree.unflatten(tree, others)))

        # The second difference of first differences: the error is of fourth order.
        near, far = ((moved(h) - moved(-h)) / (2 * h) for h in (1e-4, 2e-4))
        difference = (4 * near - far) / 3
        error = abs(np.vdot(gradient, direction) - difference)
        assert error <= tolerance * max(1, abs(difference)), (i, error)


def one_head(memory, length, **options):
    """Unbatched tokens and the initial state of one head."""
    inputs = make_inputs(memory, length, batch=1, heads=1, **options)
    tokens = inputs["key"], inputs["value"], inputs["controls"], inputs["query"]
    # Constants of a head have one axis; all else is (b, t, h, ...).
    tokens = jax.tree.map(lambda x: x[0, :, 0] if x.ndim > 1 else x.repeat(length), tokens)
    weights = {name: weight[0] for name, weight in inputs["weights"].items()}
    (key, value, controls, query), weights = jax.tree.map(jnp.asarray, (tokens, weights))
    state = memory.init(weights, key.shape[-1], value.shape[-1], key.dtype)
    return state, key, value, controls, query
