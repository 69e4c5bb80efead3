"""Every implementation of the affine update against the reference, forward and backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from memcache_jax.kernels import _sweep
from memcache_jax.kernels._dispatch import interpret_kernels
from memcache_jax.kernels._triton import lowered_for_gpu
from memcache_jax.kernels.affine_update import AffineChunk, affine_update, gpu
from tests.cases import assert_close, normals, value_and_vjp
from tests.covers import product

KERNELS = ("pallas_tpu", "pallas_gpu")
CHUNK = 8


def make_form(units=2, chunks=6, keys=4, values=6, writes=8, erasing=4, dtype=jnp.float32):
    normal = normals(0)

    def rows(*shape):
        return jnp.asarray(0.3 * normal(units, chunks, *shape), dtype)

    form = AffineChunk(
        decay=jnp.exp(-jnp.abs(rows(keys))),
        value=rows(writes, values),
        key=rows(writes, keys),
        query=rows(CHUNK, keys),
        scores=rows(CHUNK, writes),
        erase=rows(erasing, keys),
    )
    return jnp.asarray(normal(units, keys, values), dtype), form


def update(state, form, implementation="pallas_tpu", keep=3):
    return affine_update(
        lambda rows: rows, state, form, batch_dims=1, keep=keep, implementation=implementation
    )


@pytest.mark.parametrize(("implementation", "keep"), product([*KERNELS, "xla"], [1, 2, 6], turn=0))
def test_states_are_kept_between_runs(implementation, keep):
    def outputs(implementation):
        return value_and_vjp(
            lambda *xs: update(*xs, implementation=implementation, keep=keep), *make_form()
        )

    with interpret_kernels():
        got = outputs(implementation)
    wanted = outputs("reference")
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


@pytest.mark.parametrize(
    ("implementation", "erasing"), product([*KERNELS, "xla", "reference"], [4, None], turn=0)
)
def test_no_state_is_zero(implementation, erasing):
    state, form = make_form()
    if erasing is None:
        form = form._replace(erase=None)

    def outputs(state, implementation):
        return value_and_vjp(lambda form: update(state, form, implementation), form)

    with interpret_kernels():
        got = outputs(None, implementation)
    wanted = outputs(jnp.zeros_like(state), "reference")
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", KERNELS)
def test_float32_where_integers_have_64_bits(implementation):
    with interpret_kernels():
        got = value_and_vjp(lambda *xs: update(*xs, implementation=implementation), *make_form())
    wanted = value_and_vjp(lambda *xs: update(*xs, implementation="reference"), *make_form())
    assert_close(got, wanted, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16(implementation):
    state, form = make_form(dtype=jnp.bfloat16)
    with interpret_kernels():
        got = value_and_vjp(lambda *xs: update(*xs, implementation=implementation), state, form)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (state, form))
    wanted = value_and_vjp(lambda *xs: update(*xs, implementation="reference"), *wide)
    assert got[0][1].dtype == jnp.bfloat16
    assert_close(got[0], wanted[0], 1e-2)
    assert_close(got[1], wanted[1], 2e-2)


@pytest.mark.slow
def test_wrong_blocks_are_found(monkeypatch):
    specs = _sweep.specs

    def always_the_first(sweep, lead, index, tree):
        return specs(sweep, lead, lambda *place: (*index(*place)[:1], *[0] * (lead - 1)), tree)

    monkeypatch.setattr(_sweep, "specs", always_the_first)
    with interpret_kernels():
        got = update(*make_form())
    with pytest.raises(AssertionError):
        assert_close(got, update(*make_form(), "reference"), 1e-2)


@pytest.mark.slow
def test_no_races():
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(detect_races=True)
    with interpret_kernels(), pltpu.force_tpu_interpret_mode(params):
        jax.block_until_ready(value_and_vjp(update, *make_form()))
    races: Any = interpret_pallas_call.races
    assert not races.races_found


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_transformations(implementation):
    state, form = make_form(chunks=3)

    def total(state, form, implementation):
        def body(state, _):
            ends, y = jax.checkpoint(lambda *xs: update(*xs, implementation=implementation))(
                state, form
            )
            return ends[:, -1], y.sum()

        return jax.lax.scan(body, state, length=2)[1].sum()

    def gradients(implementation):
        gradient = jax.vmap(jax.grad(total, argnums=(0, 1)), in_axes=(0, None, None))
        states = jnp.stack([state, 2 * state])
        return jax.jit(gradient, static_argnums=2)(states, form, implementation)

    def sharded(implementation):
        mesh = Mesh(np.array(jax.devices()[:2]), ("units",))
        spec = PartitionSpec("units")
        run = functools.partial(update, implementation=implementation)
        return jax.jit(
            jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
        )(state, form)

    with interpret_kernels():
        got = gradients(implementation), sharded(implementation)
    assert_close(got[0], gradients("reference"), 2e-6)
    assert_close(got[1], update(state, form, "reference"), 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("every_platform")
@pytest.mark.parametrize("erasing", [None, 64])
def test_lowers_to_triton(erasing):
    state, form = jax.eval_shape(lambda: make_form(keys=96, values=64, writes=65))
    form = form._replace(erase=erasing and jax.ShapeDtypeStruct((2, 6, 64, 96), jnp.float32))

    def both(state, form):
        y, pull = jax.vjp(lambda *xs: update(*xs, implementation="pallas_gpu"), state, form)
        return pull(y)

    text = lowered_for_gpu(jax.jit(both), state, form).as_text()
    assert "affine_update_forward" in text
    assert "affine_update_backward" in text


# Keys, rows, writes and erasures of a chunk; columns, loads in flight; bytes of shared memory that
# jaxlib 0.10.2 compiles the backward pass to for an H100.
COMPILED = [
    ((128, 64, 64, 64), 32, 1, 32768),
    ((128, 64, 64, 64), 32, 2, 147456),
    ((128, 64, 64, 64), 16, 2, 122880),
    ((128, 64, 128, 64), 32, 2, 221184),
    ((128, 128, 128, 0), 32, 1, 65536),
    ((128, 128, 128, 0), 32, 2, 196608),
    ((128, 128, 128, 0), 64, 2, 262144),
    ((256, 64, 64, 0), 64, 2, 294912),
    ((256, 64, 64, 64), 32, 1, 65536),
    ((256, 64, 64, 64), 32, 3, 516096),
    ((256, 128, 256, 0), 16, 1, 262144),
]


def shapes_of(keys, rows, writes, erasing):
    def shape(*sizes) -> Any:
        return jax.ShapeDtypeStruct((2, 6, *sizes), jnp.float32)

    form = AffineChunk(
        decay=shape(keys),
        value=shape(writes, keys),
        key=shape(writes, keys),
        query=shape(rows, keys),
        scores=shape(rows, writes),
        erase=shape(erasing, keys) if erasing else None,
    )
    return jax.ShapeDtypeStruct((2, keys, keys), jnp.float32), form


@pytest.mark.parametrize(("chunk", "columns", "stages", "wanted"), COMPILED)
def test_shared_memory_is_as_compiled(chunk, columns, stages, wanted):
    _, form = shapes_of(*chunk)
    got = gpu._shared_bytes(form, gpu.Blocks(columns, 8, stages))
    assert wanted <= got < 1.1 * wanted


@pytest.mark.parametrize(
    ("chunk", "columns", "stages"),
    [
        ((64, 64, 64, 64), 32, 2),
        ((128, 128, 128, 0), 32, 2),
        ((128, 128, 128, 0), 64, 1),
        ((256, 64, 64, 64), 32, 1),
    ],
)
def test_loads_in_flight_fit_into_shared_memory(chunk, columns, stages):
    state, form = shapes_of(*chunk)
    assert gpu.plan(form, state, 6, gpu.Blocks(columns, 8, 2)).num_stages == stages


def test_what_no_program_can_hold_is_refused():
    with pytest.raises(NotImplementedError, match="needs 256 KiB, where there are 227"):
        jax.eval_shape(
            lambda *xs: update(*xs, implementation="pallas_gpu"), *shapes_of(256, 128, 129, 0)
        )


def test_the_first_call_tells_of_both_passes():
    message = r"vector memory: forward 5.* MiB and backward 6.* MiB"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(update, *shapes_of(1160, 16, 16, 0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", KERNELS)
def test_float64_is_not_served(implementation):
    with pytest.raises(NotImplementedError, match="float64"):
        update(*make_form(dtype=jnp.float64), implementation)


def test_keep_divides_the_chunks():
    with pytest.raises(ValueError, match="keep=4"):
        update(*make_form(), keep=4)
