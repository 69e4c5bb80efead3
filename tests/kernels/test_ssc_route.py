"""Every implementation of the routing against the reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.kernels import _table
from memcache_jax.kernels._dispatch import ROUTED, interpret_kernels
from memcache_jax.kernels._triton import lowered_for_gpu
from memcache_jax.kernels.ssc_route import _shared, ssc_route, tpu
from memcache_jax.kernels.ssc_route import gpu as _gpu
from tests.cases import assert_close, normals, value_and_vjp
from tests.covers import product
from tests.kernels.interpreters import (
    KERNELS,
    all_parallel,
    compare_to_reference,
    finds_races,
    runnable,
)

# The plan, heads, rows of a block, features, top_k.
CASES = {
    "constant": (mc.Constant(1).plan(7).reads, 2, 5, 8, 3),
    "logarithmic": (mc.Logarithmic(1).plan(7).reads, 1, 63, 20, 2),
    "any order": (np.array([[-1, -1, -1], [2, -1, 0], [1, 3, 2]]), 1, 1, 96, 2),
    "more than there are": (mc.Constant(1).plan(3).reads, 1, 100, 4, 4),
    "one block": (mc.Constant(1).plan(1).reads, 2, 5, 4, 2),
}


def make_case(reads, heads, rows, features, top_k, dtype="float32"):
    normal, lead = normals(0, np.float32), (2, heads)
    arrays = (
        normal(*lead, len(reads), rows, features),
        normal(*lead, reads.max(initial=-1) + 1, features),
        normal(*lead, len(reads), rows),
    )

    def operation(connector, pooled, online, **options):
        gates, own, states = ssc_route(connector, pooled, online, reads, top_k, **options)
        return gates, own, states.astype(gates.dtype)  # with a cotangent, which changes nothing

    return operation, tuple(jnp.asarray(x, dtype) for x in arrays)


def compare_case(implementation, case):
    operation, arrays = make_case(*case)
    compare_to_reference(operation, implementation, *arrays, tolerance=1e-6)


@pytest.mark.parametrize(("case", "implementation"), product(CASES, ["xla", *KERNELS], turn=0))
def test_equals_reference(implementation, case):
    compare_case(implementation, case)


def test_what_is_kept_for_the_backward_pass_is_named():
    operation, arrays = make_case(*CASES["constant"])

    def loss(*arrays):
        return operation(*arrays, implementation="pallas_tpu")[0].sum()

    with interpret_kernels():
        traced = jax.make_jaxpr(jax.grad(loss))(*arrays)
    assert str(traced).count(f"name={ROUTED}") == 3  # gates, those of the online state, and states


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["constant", "logarithmic"])
def test_equals_the_gates_of_ssc(name):
    reads, *_, top_k = case = CASES[name]
    _, (connector, pooled, online) = make_case(*case, dtype="float64")
    gates, own, states = ssc_route(connector, pooled, online, reads, top_k)
    cached = jnp.einsum("bhnck,bhrk->bhncr", connector, pooled)
    of_slot = jnp.asarray(np.maximum(reads, 0)[None, None, :, None])
    cached = jnp.take_along_axis(cached, of_slot, axis=-1)
    visible = jnp.asarray(reads >= 0)[None, None, :, None]
    all_gates, own_wanted = mc.SSC(top_k=top_k).gates(jnp.where(visible, cached, -jnp.inf), online)
    assert_close(own, own_wanted, 1e-12)
    match = (of_slot[..., None] == states[..., None, :]) & visible[..., None]
    got = jnp.where(match, gates[..., None, :], 0).sum(axis=-1)
    assert_close(got, all_gates, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "xla", *KERNELS])
def test_of_equally_relevant_states_the_older(implementation):
    reads = mc.Constant(1).plan(6).reads
    connector, online = jnp.ones((1, 1, 6, 2, 4)), jnp.zeros((1, 1, 6, 2))
    pooled = (
        jnp.array([1.0, 2.0, 2.0, 1.0, 2.0])[None, None, :, None] * jnp.ones(4)[None, None, None]
    )
    with runnable(implementation):
        gates, _, states = ssc_route(
            connector, pooled, online, reads, 2, implementation=implementation
        )
    wanted = [[-1, -1], [0, -1], [1, 0], [1, 2], [1, 2], [1, 2]]
    np.testing.assert_array_equal(states[0, 0, :, 0], wanted)
    np.testing.assert_array_equal(gates[0, 0, 0], 0.0)
    np.testing.assert_array_equal(gates[0, 0, 1, :, 1], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_tiles_of_rows(monkeypatch, implementation):
    rows = {"pallas_tpu": 128, "pallas_gpu": 32}[implementation]
    sizes = {**_table.TABLE[f"ssc_route/{implementation}"]["default"], "rows": rows}
    monkeypatch.setitem(_table.TABLE, f"ssc_route/{implementation}", {"default": sizes})
    compare_case(implementation, (mc.Constant(1).plan(4).reads, 1, 150, 4, 2))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16(implementation):
    operation, arrays = make_case(*CASES["constant"], dtype="bfloat16")
    compare_to_reference(
        operation, implementation, *arrays, tolerance=1e-2, wanted_dtype=jnp.float32
    )


@pytest.mark.parametrize(("implementation", "error"), product(KERNELS, ["mask", "scatter"], turn=0))
def test_a_wrong_mask_is_seen(monkeypatch, implementation, error):
    module = {"pallas_tpu": tpu, "pallas_gpu": _gpu}[implementation]

    def select(logits, reads, *rest):
        return _shared.select(logits, jnp.maximum(reads, 0), *rest)

    def scattered(d_logits, states, reads):
        return _shared.scattered(d_logits, states, reads + 1)

    name, wrong = ("select", select) if error == "mask" else ("scattered", scattered)
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError, match="> "):
        compare_case(implementation, CASES["constant"])


@pytest.mark.slow
def test_no_two_cores_write_one_block(monkeypatch):
    operation, arrays = make_case(mc.Constant(1).plan(3).reads, 1, 3, 4, 1)

    def run(*arrays):
        return value_and_vjp(lambda *xs: operation(*xs, implementation="pallas_tpu"), *arrays)

    assert not finds_races(run, *arrays)
    monkeypatch.setattr(tpu, "tpu_call", all_parallel(tpu.tpu_call))
    assert finds_races(run, *(x[:1] for x in arrays))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("implementation", "name"), product(KERNELS, ["constant", "any order"], turn=1)
)
def test_float32_where_integers_have_64_bits(implementation, name):
    compare_case(implementation, CASES[name])


def lowered(states):
    """The program for a GPU in which the last of two blocks may select any of so many states."""
    reads = np.stack([np.full(states, -1), np.arange(states)])
    shapes = ((1, 1, 2, 64, 128), (1, 1, states, 128), (1, 1, 2, 64))

    def route(connector, pooled, online):
        return ssc_route(connector, pooled, online, reads, 4, implementation="pallas_gpu")[:2]

    return lowered_for_gpu(
        jax.jit(lambda *xs: value_and_vjp(route, *xs)),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
    ).as_text()


@pytest.mark.slow
@pytest.mark.usefixtures("every_platform")
def test_as_many_states_as_a_gpus_registers_hold():
    assert "ssc_route_backward_keys" in lowered(512)
    with pytest.raises(NotImplementedError, match=r"1024 slots, filled up, where .* 512"):
        lowered(513)


def test_refusals():
    operation, arrays = make_case(*CASES["constant"])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
        for implementation in KERNELS:
            with pytest.raises(NotImplementedError, match="float64"):
                operation(*wide, implementation=implementation)
    with pytest.raises(ValueError, match="got 'cuda'"):
        operation(*arrays, implementation="cuda")


@pytest.mark.slow
@pytest.mark.usefixtures("every_platform")
def test_triton_kernels_lower():
    operation, arrays = make_case(mc.Constant(256).plan(17 * 256).reads, 1, 256, 128, 4)
    function = jax.jit(
        lambda *xs: value_and_vjp(lambda *xs: operation(*xs, implementation="pallas_gpu"), *xs)
    )
    text = lowered_for_gpu(function, *arrays).as_text()
    for kernel in ("forward", "backward_rows", "backward_keys"):
        assert f"ssc_route_{kernel}" in text
