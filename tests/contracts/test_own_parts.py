"""A user's own memory, aggregation, gate and policy have one effect on every path."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.gating import ContentGate, Gate, visible
from memcache_jax.kernels.affine_update import AffineChunk
from memcache_jax.kernels.decay import decay_matrix, start_decay
from memcache_jax.sharding import make_mesh
from memcache_jax.streaming.eviction import Eviction
from tests.cases import MEMORIES, STARTS, assert_close, make_inputs, scheduled
from tests.covers import kept_of
from tests.streams import over_time, streamed

LENGTH, SEGMENTATION = 32, mc.Constant(4)


@dataclasses.dataclass(frozen=True)
class Doubled(mc.memories.AffineMemory):
    """M_t = alpha_t M_{t-1} + 2 v_t k_t^T, by its step and the map of a chunk alone."""

    @property
    def controls(self):
        return {"log_alpha": mc.memories.Control(activation=jax.nn.log_sigmoid, forget=-jnp.inf)}

    def step(self, state, anchor, key, value, controls):
        kept = jnp.exp(controls["log_alpha"]) * state.matrix
        return state._replace(matrix=kept + 2 * jnp.outer(key, value))

    def affine(self, before, key, value, query, controls):
        decays, since = (f(controls["log_alpha"]) for f in (decay_matrix, start_decay))
        return AffineChunk(
            decay=jnp.broadcast_to(since[-1:], key.shape[1:]),
            value=2 * value,
            key=decays[-1][:, None] * key,
            query=since[:, None] * query,
            scores=decays * (query @ key.T),
        )


@dataclasses.dataclass(frozen=True)
class Erasing(mc.memories.AffineMemory):
    """M_t = M_{t-1} (I - beta_t k_t k_t^T) + v_t k_t^T, as docs/write_your_own_memory.md has it."""

    @property
    def controls(self):
        return {"beta": mc.memories.Control()}

    def step(self, state, anchor, key, value, controls):
        held = controls["beta"] * (key @ state.matrix)
        return state._replace(matrix=state.matrix + jnp.outer(key, value - held))

    def affine(self, before, key, value, query, controls):
        beta = controls["beta"][:, None]
        system = jnp.eye(len(key)) + beta * jnp.tril(key @ key.T, -1)
        added, erase = (jnp.linalg.solve(system, side) for side in (value, beta * key))
        scores = jnp.tril(query @ key.T)
        return AffineChunk(jnp.ones_like(key[0]), added, key, query, scores, erase)


@dataclasses.dataclass(frozen=True)
class WrittenAgain(Erasing):
    """The same, whose runs do not compose."""

    form = "affine"
    merges = False


@dataclasses.dataclass(frozen=True)
class Sharpened(mc.memories.SSD):
    """Reads of its own: a rule that derives from a finished one."""

    def forward(self, apply, query, gate=None):
        return super().forward(apply, jnp.sign(query) * query**2, gate)


@dataclasses.dataclass(frozen=True)
class Halved(mc.GRM):
    """Gates of its own."""

    def gates(self, cached, live):
        cached, live = super().gates(cached, live)
        return cached / 2, live


@dataclasses.dataclass(frozen=True)
class LastTwo(mc.GRM):
    """A selection of its own: the states of the last two segments."""

    def gates(self, cached, live):
        return super().gates(cached, live)

    def select(self, connector, candidates, *, implementation=None):
        near = jnp.asarray(candidates.distances) <= 2
        states = jnp.where(near, jnp.asarray(candidates.states), -1)
        return super().select(connector, candidates._replace(states=states))


@dataclasses.dataclass(frozen=True)
class Recency(mc.GRM):
    """Uniform gates that fade with distance: no mean of states stands for the states."""

    gate = "uniform"

    def select(self, connector, candidates, *, implementation=None):
        selection = super().select(connector, candidates)
        fade = 0.5 ** jnp.asarray(candidates.distances)[:, None, :, None]
        return selection._replace(gates=selection.gates * fade)


@dataclasses.dataclass(frozen=True)
class HalvedRouter(mc.SSC):
    """Gates of its own over the states that a router picks."""

    top_k: int = 2

    def gates(self, cached, live):
        cached, live = super().gates(cached, live)
        return cached / 2, live


@dataclasses.dataclass(frozen=True)
class Nearest(mc.GRM):
    """A table of its own: the two states nearest to each block, the nearest first."""

    def select(self, connector, candidates, *, implementation=None):
        distances = jnp.where(visible(candidates)[:, :, 0], jnp.asarray(candidates.distances), 99)
        near = jnp.argsort(distances, axis=-1)[..., :2]

        def taken(x):
            return jnp.take_along_axis(jnp.broadcast_to(jnp.asarray(x), distances.shape), near, -1)

        near_ones = taken(distances) < 99
        counts = None if candidates.counts is None else taken(candidates.counts)
        table = candidates._replace(
            states=jnp.where(near_ones, taken(candidates.states), -1),
            distances=taken(candidates.distances),
            counts=counts,
        )
        return super().select(connector, table)


@dataclasses.dataclass(frozen=True)
class Apart(mc.GRM):
    """Reads of its own: cached states by the query, the live memory by the query's negative."""

    def needs(self, memory):
        return ("layers",)

    def read(self, bank, live, query, selection):
        own = bank.memory.forward(live.apply, -query)
        return selection.live[..., None] * own + bank.read(query, selection)

    def read_token(self, memory, states, query, gates):
        def read(i, query):
            return memory.read(jax.tree.map(lambda x: x[i], states), query[None])[0]

        cached = sum(gates[i] * read(i, query) for i in range(len(gates) - 1))
        return cached + gates[-1] * read(-1, -query)


@dataclasses.dataclass(frozen=True)
class Fading(Gate):
    """Relevance by content that fades with distance."""

    rate: float = 0.5
    connector = "key"
    reads_keys = True

    def score(self, connector, key, distance):
        return jnp.vdot(connector, key) - self.rate * distance


@dataclasses.dataclass(frozen=True)
class Weaker(ContentGate):
    """A gate that derives from a finished one, and has another equation."""

    def score(self, connector, key, distance):
        return super().score(connector, key, distance) / 4


PARTS: dict[str, tuple[Any, Any]] = {
    "affine memory": (Doubled(), mc.GRM()),
    "memory from a finished one": (Sharpened(), mc.SSC(top_k=2)),
    "gates": (MEMORIES["gated_deltanet"], Halved()),
    "selection": (MEMORIES["linear"], LastTwo()),
    "selection by distance": (MEMORIES["linear"], Recency(gate="uniform")),
    "reads": (MEMORIES["titans"], Apart()),
    "gate": (MEMORIES["titans"], mc.GRM(gate=Fading())),
    "gates of a router": (MEMORIES["linear"], HalvedRouter()),
    "table": (MEMORIES["linear"], Nearest()),
    "gate from a finished one": (MEMORIES["linear"], mc.GRM(gate=Weaker())),
    "gate of a soup": (MEMORIES["titans"], mc.Soup(gate=Fading())),
    "gate of a router": (MEMORIES["ssd"], mc.SSC(gate=Fading(), top_k=2)),
}


@functools.cache
def plain(memory):
    """The outputs with an aggregation that is nobody's own."""
    inputs = make_inputs(memory, LENGTH, batch=1, heads=2)
    how: dict[str, Any] = dict(aggregation=mc.GRM(), segmentation=SEGMENTATION)
    return jax.jit(lambda inputs: mc.memory_caching(**inputs, memory=memory, **how))(inputs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "part",
    kept_of(PARTS, "affine memory", "gates", "selection", "reads", "gate of a router"),
)
def test_one_effect_on_every_path(part):
    memory, aggregation = part
    inputs = make_inputs(memory, LENGTH, batch=1, heads=2)
    how: dict[str, Any] = dict(memory=memory, aggregation=aggregation, segmentation=SEGMENTATION)

    def outputs(function, **options):
        return jax.jit(lambda inputs: function(**inputs, **how, **options))(inputs)

    one_pass = outputs(mc.memory_caching)
    # What is its own has an effect at all.
    if aggregation not in (mc.GRM(), mc.SSC(top_k=2)):
        assert abs(one_pass - plain(memory)).max() > 1e-3

    if not isinstance(
        aggregation, (LastTwo, Nearest, Recency)
    ):  # whose equation is not `gates` alone
        assert_close(one_pass, outputs(mc.memory_caching, implementation="reference"), 1e-12)
    with jax.set_mesh(make_mesh(dict(seq=4, tensor=2))):
        assert_close(outputs(mc.memory_caching), one_pass, 1e-12)
        if not isinstance(aggregation, (Apart, mc.Soup)):
            assert_close(outputs(mc.memory_caching, exchange="ring"), one_pass, 1e-12)
    in_stream = streamed(inputs, memory, aggregation, SEGMENTATION, split=(11, 1, 20))
    assert_close(in_stream, one_pass, 1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("start", kept_of(STARTS, "independent"))
def test_an_affine_memory_has_all_its_paths(start):
    memory = Doubled()
    assert memory.form == "affine"
    inputs = make_inputs(memory, 22, batch=1, heads=1)

    @jax.jit
    def both(inputs):
        how: dict[str, Any] = dict(memory=memory, aggregation=mc.SSC(top_k=2), start=start)
        how["segmentation"] = mc.Logarithmic(4)
        ids = (jnp.arange(22) > 9).astype(jnp.int32)[None]
        results = []
        for implementation in (None, "reference"):
            for documents in (None, ids):
                run = mc.memory_caching(
                    **inputs, **how, document_ids=documents, implementation=implementation
                )
                results.append(run)
        return results

    with scheduled("in_turn"):
        plain, packed, *wanted = both(inputs)
    assert_close([plain, packed], wanted, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("start", kept_of(STARTS, "checkpoint"))
def test_buckets_of_an_affine_memory_with_and_without_compose(start):
    composes, again = Erasing(), WrittenAgain()
    assert (composes.merges, again.merges) == (True, False)
    inputs = make_inputs(composes, 14, batch=1, heads=1)
    how: dict[str, Any] = dict(aggregation=mc.GRM(), segmentation=mc.Logarithmic(2), start=start)

    @jax.jit
    def run(inputs):
        in_turn = mc.memory_caching(**inputs, **how, memory=again, implementation="reference")
        return in_turn, [mc.memory_caching(**inputs, **how, memory=m) for m in (composes, again)]

    with scheduled("in_turn"):
        wanted, passes = run(inputs)
        step, reads = jax.jit(mc.extend), []
        sizes = 1, 1, 4, 4
        cache = mc.init_cache(*sizes, memory=composes, **how, max_length=14, dtype=jnp.float64)
        for begin in (0, 7):
            part = over_time(inputs, composes, lambda x, b=begin: x[:, b : b + 7])
            y, cache = step(cache, **part)
            reads.append(y)
    for got in (*passes, jnp.concatenate(reads, axis=1)):
        assert_close(got, wanted, 1e-11)


def test_a_finished_rule_states_its_form_and_a_class_from_it_states_its_own():
    class Same(mc.memories.SSD):
        form = "affine"
        merges = True

    assert mc.memories.SSD.form == Same.form == "affine"
    assert (Sharpened.form, Sharpened.merges) == ("scan", False)
    assert mc.memories.Titans.form == "descent"
    with pytest.raises(TypeError, match=r"Wrong overrides forward, .* state form = 'scan'"):

        class Wrong(mc.memories.SSD):
            form = "affine"

            def forward(self, apply, query, gate=None):
                return super().forward(apply, 2 * query, gate)

    class Other:
        def forward(self, apply, query, gate=None):
            return query

    with pytest.raises(TypeError, match=r"Mixed overrides forward, .* state form = 'scan'"):

        class Mixed(Other, mc.memories.AffineMemory):
            pass

    with pytest.raises(TypeError, match=r"form must be one of .*, got 'affin'"):

        class Misspelt(mc.memories.SSD):
            form: Any = "affin"

    with pytest.raises(TypeError, match=r"form='affine' needs .* AffineMemory .*, got Memory"):

        class Rootless(mc.memories.Vector):
            form = "affine"

    with pytest.raises(TypeError, match=r"'descent' needs .* DeepMemory for .*, got AffineMemory"):

        class Shallow(mc.memories.SSD):
            form = "descent"


@dataclasses.dataclass(frozen=True)
class Window(mc.Constant):
    """A segmentation that derives from a finished one: the last two segments."""

    def plan(self, length):
        plan = super().plan(length)
        near = plan.reads >= np.arange(plan.num_blocks)[:, None] - 2
        return dataclasses.replace(plan, reads=np.where(near, plan.reads, -1))


@dataclasses.dataclass(frozen=True)
class Doubling(mc.Segmentation):
    """Segments of 1, 1, 2, 4, ... blocks."""

    size: int

    def plan(self, length):
        blocks = -(-length // self.size)
        borders = np.array([0, *(2**i for i in range(blocks.bit_length() + 1))])
        segment = np.searchsorted(borders, np.arange(blocks), side="right") - 1
        spans = list(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True))
        return mc.ReadPlan.of(self.size, [spans[:s] for s in segment], borders[segment])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("segmentation", [Window(4), Doubling(4)], ids=["window", "doubling"])
def test_a_segmentation_of_ones_own(segmentation):
    memory = MEMORIES["gated_deltanet"]
    inputs = make_inputs(memory, LENGTH, batch=1, heads=2)
    how: dict[str, Any] = dict(memory=memory, aggregation=mc.GRM(), segmentation=segmentation)

    def outputs(function, **options):
        with scheduled("in_turn"):
            return jax.jit(lambda inputs: function(**inputs, **how, **options))(inputs)

    one_pass = outputs(mc.memory_caching)
    assert_close(one_pass, outputs(mc.memory_caching, implementation="reference"), 1e-12)
    cache = mc.init_cache(*(1, 2, 4, 4), **how, max_length=LENGTH, dtype=jnp.float64)
    in_stream, _ = jax.jit(mc.extend)(cache, **over_time(inputs, memory, jnp.asarray))
    assert_close(in_stream, one_pass, 1e-11)
    with jax.set_mesh(make_mesh(dict(seq=4, tensor=2))):
        if isinstance(segmentation, Doubling):
            with pytest.raises(ValueError, match="segments of one size, got Doubling"):
                outputs(mc.memory_caching)
        else:
            assert_close(outputs(mc.memory_caching), one_pass, 1e-12)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (dict(buckets=[[0, 1]]), "buckets must be a NumPy array of integers"),
        (dict(buckets=np.array([[1, 2]]), first=np.array([0, 0, 2])), "begin where segments do"),
        (dict(buckets=np.array([[0, 2]])), "only buckets that end before its segment begins"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_plan_that_is_none(plan, message):
    reads, first = np.array([[-1], [0], [0]]), np.arange(3)
    with pytest.raises(ValueError, match=message):
        mc.ReadPlan(**dict(block_size=4, reads=reads, first=first) | plan)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", kept_of(["constant", "logarithmic"], "logarithmic"))
def test_a_gate_of_ones_own_keeps_documents_apart_in_gradients(name):
    memory = MEMORIES["linear"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 24, batch=1, heads=1))
    ids = (jnp.arange(24) >= 12).astype(jnp.int32)[None]
    segmentation = dict(constant=mc.Constant, logarithmic=mc.Logarithmic)[name](4)

    @jax.jit
    def gradient(inputs):
        def loss(connector):
            arrays = inputs | dict(connector=connector)
            y = mc.memory_caching(
                **arrays,
                memory=memory,
                aggregation=mc.GRM(gate=Fading()),
                segmentation=segmentation,
                document_ids=ids,
            )
            return (y[:, 12:] ** 2).sum()

        return jax.grad(loss)(inputs["connector"])

    broken = inputs | dict(key=inputs["key"].at[0, 3].set(jnp.nan))
    assert_close(gradient(broken)[:, 12:], gradient(inputs)[:, 12:], 1e-12)


@pytest.mark.slow
def test_a_layer_that_was_not_kept_is_named():
    class Later(mc.GRM):
        def read(self, bank, live, query, selection):
            return live.apply(0, query)

    memory = MEMORIES["titans"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 8, batch=1, heads=1, dtype=np.float32))
    with pytest.raises(ValueError, match=r"needs\(memory\) must name 'layers'"):
        mc.memory_caching(**inputs, memory=memory, aggregation=Later(), segmentation=SEGMENTATION)


@dataclasses.dataclass(frozen=True)
class DropNewest(Eviction):
    """The newest state goes, so that the first ones stay for ever."""

    def worth(self, kept, block):
        return -kept.newest.astype(jnp.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_policy_of_ones_own():
    memory = MEMORIES["linear"]
    inputs = make_inputs(memory, 20, batch=1, heads=1)
    cache = mc.init_cache(
        *(1, 1, 4, 4),
        memory=memory,
        aggregation=mc.Residual(),
        segmentation=SEGMENTATION,
        max_segments=2,
        policy=DropNewest(),
        dtype=jnp.float64,
    )
    y, _ = jax.jit(mc.extend)(cache, **over_time(inputs, memory, jnp.asarray))
    key, value, query = (inputs[name][0, :, 0] for name in ("key", "value", "query"))

    def read(t, first, after):
        return query[t] @ (key[first:after].T @ value[first:after])

    t = 19  # segments 0 and 3 are kept, of 0 to 3, and 4 is live
    wanted = read(t, 0, 4) + read(t, 12, 16) + read(t, 16, t + 1)
    np.testing.assert_allclose(y[0, t, 0], wanted, rtol=1e-12)
