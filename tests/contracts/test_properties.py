"""What must hold at any shape: lengths, sizes and options drawn at random, in float64."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

import memcache_jax as mc
from memcache_jax.engine.gates import gates_of_tokens
from memcache_jax.gating import GATES
from tests.cases import (
    MEMORIES,
    SEGMENTATIONS,
    STARTS,
    Together,
    assert_close,
    assert_slopes,
    make_inputs,
    normals,
    scheduled,
)
from tests.covers import rules
from tests.streams import streamed

MATRICES = tuple(name for name, memory in MEMORIES.items() if memory.depth == 1)
DEEP = tuple(name for name in MEMORIES if name not in MATRICES)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def at_any_shape(examples):
    """Each shape is a program to compile: few, always the same ones, and no search for smaller."""
    phases = set(Phase) - {Phase.shrink, Phase.explain}
    return settings(max_examples=examples, deadline=None, phases=phases, derandomize=True)


@dataclasses.dataclass
class Case:
    """A rule and its random arguments, a segmentation and a start."""

    memory: mc.memories.Memory
    length: int
    sizes: Mapping[str, int]
    kind: str
    size: int
    counts: tuple[int, ...]
    start: Any

    @property
    def segmentation(self):
        """Of blocks of ``size`` tokens, so many in each segment of given lengths."""
        lengths = (self.size * count for count in (*self.counts, self.length))
        return (
            mc.Lengths(tuple(lengths))
            if self.kind == "lengths"
            else SEGMENTATIONS[self.kind](self.size)
        )

    @functools.cached_property
    def inputs(self):
        inputs = make_inputs(self.memory, self.length, **self.sizes)
        if self.memory.gradient_chunk:
            inputs["controls"]["eta"] *= 0.05  # a larger one diverges
        return inputs

    @property
    def states(self):
        """The most cached states that a token reads."""
        return self.segmentation.plan(self.length).reads.shape[1]

    def outputs(self, inputs, aggregation, implementation=None):
        with scheduled("in_turn"):
            return mc.memory_caching(
                **inputs,
                memory=self.memory,
                aggregation=aggregation,
                segmentation=self.segmentation,
                start=self.start,
                implementation=implementation,
            )

    def run(self, *ways):
        """The outputs by several (aggregation, implementation), in one program."""
        return jax.jit(lambda inputs: [self.outputs(inputs, *way) for way in ways])(self.inputs)


@st.composite
def cases(draw, names=tuple(MEMORIES), starts=STARTS):
    """Lengths need not be multiples of a segment, nor of a chunk."""
    memory: Any = MEMORIES[draw(st.sampled_from(names))]
    chunk = draw(st.integers(1, 5))
    if memory.gradient_chunk:
        memory = dataclasses.replace(memory, chunk_size=chunk)
    sizes = dict(
        batch=draw(st.integers(1, 2)), heads=draw(st.integers(1, 3)), dim=draw(st.integers(2, 4))
    )
    if memory.depth == 1:
        sizes["value_dim"] = draw(st.integers(1, 4))
    return Case(
        memory=memory,
        length=38 - draw(st.integers(1, 37)),  # the first example is the longest
        sizes=sizes,
        kind=draw(st.sampled_from([*SEGMENTATIONS, "lengths"])),
        size=chunk * draw(st.integers(1, 4)),
        counts=draw(st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)),
        start=draw(st.sampled_from(starts)),
    )


GATED = dict(gate=st.sampled_from(tuple(GATES)), pooling=st.sampled_from(("mean", "sum")))
ROUTED = GATED | dict(top_k=st.integers(1, 3), inner=st.sampled_from(("grm", "soup")))
AGGREGATIONS = st.one_of(
    st.builds(mc.SSC, **ROUTED),
    st.builds(mc.GRM, **GATED),
    st.builds(mc.Soup, **GATED),
    st.just(mc.Residual()),
)


def plain_attention(inputs, times: Any = 1):
    """Linear attention that counts key j ``times[t, j]`` times for query t."""
    scores = np.einsum("bthk,bshk->bhts", inputs["query"], inputs["key"])
    return np.einsum("bhts,bshv->bthv", np.tril(scores) * times, inputs["value"])


@pytest.mark.slow
@at_any_shape(4)
@given(cases(["linear"], ["independent"]))
def test_residual_of_linear_attention_is_linear_attention(case):
    (y,) = case.run([mc.Residual()])
    assert_close(y, plain_attention(case.inputs), 1e-12, scale=1.0)


@pytest.mark.slow
@at_any_shape(6)
@given(cases(MATRICES), st.fixed_dictionaries(GATED))
def test_soup_of_matrices_is_grm(case, options):
    got, wanted = case.run([mc.GRM(**options)], [mc.Soup(**options), "reference"])
    assert_close(got, wanted, 1e-11, scale=1.0)


@pytest.mark.slow
@at_any_shape(4)
@given(cases(DEEP))
def test_soup_of_deep_memories_is_not_grm(case):
    assume(case.states > 0)
    grm, soup = case.run([mc.GRM()], [mc.Soup()])
    assert abs(grm - soup).max() > 1e-13  # of a second order in small steps


@pytest.mark.slow
@at_any_shape(5)
@given(cases(), st.sampled_from(["grm", "soup"]))
def test_a_router_that_takes_all_is_what_it_routes_to(case, inner):
    most = case.states
    assume(most > 1)
    routers = ([mc.SSC(top_k=top_k, inner=inner)] for top_k in (most, most + 2, most - 1))
    wanted, all_, more, fewer = case.run([dict(grm=mc.GRM(), soup=mc.Soup())[inner]], *routers)
    assert_close(all_, wanted, 1e-11, scale=1.0)
    assert_close(more, wanted, 1e-11, scale=1.0)
    assert abs(fewer - wanted).max() > 1e-8


@pytest.mark.slow
@at_any_shape(5)
@given(cases())
def test_one_segment_is_the_base_rule(case):
    kinds = Together((mc.Residual(), *(mc.GRM(gate=gate) for gate in GATES), mc.Soup(), mc.SSC()))
    one = dataclasses.replace(case, kind="constant", size=case.size * case.length)
    got, base = one.run([kinds], [mc.Residual(), "reference"])
    assert_close(got, kinds.scaled([base] * len(kinds.kinds)), 1e-11, scale=1.0)


@pytest.mark.slow
@at_any_shape(4)
@given(cases(["vector"]))
def test_vectors_in_segments_of_one_token_are_softmax_attention(case):
    case = dataclasses.replace(
        case, kind="constant", size=1, sizes=case.sizes | dict(value_dim=None)
    )
    (y,) = case.run([mc.GRM()])
    u, k, v = (case.inputs[name] for name in ("connector", "key", "value"))
    weights = np.tril(np.exp(np.einsum("bthk,bshk->bhts", u, k)))
    weights /= weights.sum(axis=-1, keepdims=True)
    assert_close(y, np.einsum("bhts,bshv->bthv", weights, v), 1e-12, scale=1.0)
    # JAX takes the softmax in float32 whatever the inputs are.
    wanted = jax.nn.dot_product_attention(u, k, v, is_causal=True, scale=1.0)
    assert_close(y, wanted, 1e-6, scale=1.0)


def ends_of_buckets(block):
    """The prefix sums of a number's binary expansion, largest first."""
    powers = (1 << p for p in reversed(range(block.bit_length())) if block >> p & 1)
    return list(itertools.accumulate(powers))


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 9))
@example(37, 64, 64)
def test_logarithmic_buckets_end_at_prefix_sums(block, size, tokens):
    plan = mc.Logarithmic(size).plan(size * block + min(tokens, size))
    assert plan.num_blocks == block + 1
    ends = ends_of_buckets(block)
    assert block != 37 or ends == [32, 36, 37]
    buckets = plan.buckets[plan.reads[block][plan.visible[block]]]
    assert buckets.tolist() == [list(pair) for pair in itertools.pairwise([0, *ends])]


@pytest.mark.slow
@at_any_shape(4)
@given(cases(["linear"], ["checkpoint"]))
def test_logarithmic_checkpoints_lie_at_prefix_sums(case):
    case = dataclasses.replace(case, kind="logarithmic")
    (y,) = case.run([mc.Residual()])
    times = np.ones((case.length, case.length))
    for t in range(case.length):
        for end in ends_of_buckets(t // case.size):
            times[t, : end * case.size] += 1
    assert_close(y, plain_attention(case.inputs, times), 1e-12, scale=1.0)


@pytest.mark.parametrize("name", rules(1))
@at_any_shape(2)
@given(st.data(), AGGREGATIONS, st.sampled_from([None, "xla"]))
def test_chunks_equal_tokens(name, data, aggregation, implementation):
    case = data.draw(cases([name]))
    got, wanted = case.run([aggregation, implementation], [aggregation, "reference"])
    assert_close(got, wanted, 1e-11, scale=max(1.0, float(abs(wanted).max())))


@pytest.mark.slow
@at_any_shape(6)
@given(cases(), AGGREGATIONS, st.data())
def test_any_split_equals_the_whole(case, aggregation, data):
    cuts = data.draw(st.lists(st.integers(1, case.length), max_size=2), "cuts")
    borders = sorted({0, *cuts, case.length})
    split = tuple(end - begin for begin, end in itertools.pairwise(borders))
    how = case.memory, aggregation, case.segmentation, case.start
    got = streamed(case.inputs, *how, split=split)
    (wanted,) = case.run([aggregation])
    assert_close(got, wanted, 1e-10, scale=max(1.0, float(abs(wanted).max())))


@pytest.mark.slow
@at_any_shape(5)
@given(cases(), AGGREGATIONS)
def test_gradients_are_those_of_differences(case, aggregation):
    normal = normals(9)
    mask = normal(*case.inputs["value"].shape)

    @jax.jit
    def loss_and_gradients(inputs):
        with scheduled("in_turn"):
            return jax.value_and_grad(lambda i: jnp.vdot(mask, case.outputs(i, aggregation)))(
                inputs
            )

    @jax.jit
    def read(inputs):
        """Which states have gates: the router's choice of them has no gradient."""
        how = dict(aggregation=aggregation, segmentation=case.segmentation)
        return gates_of_tokens(inputs["key"], inputs["connector"], **how) > 0

    at_first = read(case.inputs)

    def loss(inputs):
        assume((read(inputs) == at_first).all())
        return loss_and_gradients(inputs)[0]

    _, gradients = loss_and_gradients(case.inputs)
    assert_slopes(loss, case.inputs, gradients, normal, 1e-7)
