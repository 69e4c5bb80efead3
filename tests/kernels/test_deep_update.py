"""The deep update's kernels against chunks written in turn, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import memcache_jax as mc
from memcache_jax.kernels._dispatch import interpret_kernels
from memcache_jax.kernels._triton import lowered_for_gpu
from memcache_jax.kernels.deep_update import _carry, deep_update, gpu
from tests.cases import assert_close, normals, value_and_vjp
from tests.covers import first_kept, product

CASES = {
    "titans k=24 m=8": (mc.memories.Titans(), 24, 8),
    "titans k=96 m=20": (mc.memories.Titans(expansion=1), 96, 20),
    "dla k=32 m=8": (mc.memories.DLA(expansion=3), 32, 8),
    "titans depth 1 k=24 m=20": (mc.memories.Titans(depth=1), 24, 20),
    "dla depth 1 k=96 m=8": (mc.memories.DLA(depth=1), 96, 8),
}


def make(memory, k, m, units=2, dtype=jnp.float32):
    """Chunks, the states given, and where runs go on: two of two chunks and one of four."""
    normal = normals(0, np.float32)
    chunks = 4
    shapes = memory.weight_shapes(k, k).values()
    weights = tuple(
        jnp.asarray(normal(units, chunks, *shape[::-1]) / shape[1] ** 0.5) for shape in shapes
    )
    momentum = jax.tree.map(lambda w: 0.1 * jnp.roll(w, 1, axis=1), weights)
    given = (weights, momentum) if "log_beta" in memory.controls else (weights,)
    key, value = jnp.asarray(normal(2, units, chunks, m, k)) / k**0.5
    controls = {
        name: jnp.asarray(-abs(x) if name.startswith("log") else abs(x) / m)
        for name, x in ((name, normal(units, chunks, m)) for name in memory.controls)
    }
    form = jax.vmap(jax.vmap(memory.descent))(key, value, controls)
    goes_on = jnp.array([[0.0, 1, 1, 1], [0, 1, 0, 1]])
    cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
    return cast(form), given, jnp.tile(goes_on, (units // 2, 1))


def outputs(memory, arrays, implementation):
    form, given, goes_on = arrays

    def update(form, given):
        return deep_update(form, given, goes_on, loss=memory.loss, implementation=implementation)

    return value_and_vjp(update, form, given)


def compare(memory, arrays, tolerance=1e-6):
    with interpret_kernels():
        got = outputs(memory, arrays, "pallas_gpu")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    wanted = outputs(memory, wide, "reference")
    dtypes = jax.tree.map(lambda x: x.dtype, (got[1], arrays[:2]))
    assert dtypes[0] == dtypes[1]
    assert_close(got[0], wanted[0], tolerance)
    assert_close(got[1], wanted[1], 2 * tolerance)


@pytest.mark.parametrize(("memory", "k", "m"), first_kept(3, CASES))
def test_kernels_equal_chunks_in_turn(memory, k, m):
    compare(memory, make(memory, k, m))


@pytest.mark.slow
def test_bfloat16():
    memory = mc.memories.Titans(expansion=1)
    compare(memory, make(memory, 16, 8, dtype=jnp.bfloat16), 1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_float32_where_integers_have_64_bits():
    memory = mc.memories.Titans(expansion=1)
    compare(memory, make(memory, 16, 8))


@pytest.mark.slow
def test_transformations():
    memory = mc.memories.Titans(expansion=1)
    form, given, goes_on = make(memory, 16, 4)

    def update(form, given, goes_on, implementation):
        return deep_update(form, given, goes_on, loss=memory.loss, implementation=implementation)

    def gradients(implementation):
        def total(form, given):
            @jax.checkpoint
            def body(given, _):
                return update(form, given, goes_on, implementation), None

            given, _ = jax.lax.scan(body, given, length=2)
            return jax.tree.reduce(lambda total, x: total + jnp.sum(x**2), given, 0.0)

        gradient = jax.vmap(jax.grad(total, argnums=(0, 1)), in_axes=(0, None))
        return jax.jit(gradient)(jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), form), given)

    def sharded(implementation):
        mesh = Mesh(np.array(jax.devices()[:2]), ("units",))
        spec = PartitionSpec("units")
        run = functools.partial(update, implementation=implementation)
        parts = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(parts)(form, given, goes_on)

    with interpret_kernels():
        got = gradients("pallas_gpu"), sharded("pallas_gpu")
    assert_close(got[0], gradients("reference"), 2e-6)
    assert_close(got[1], update(form, given, goes_on, "reference"), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["starts_of", "d_starts_of"])
def test_wrong_tiles_are_found(monkeypatch, name):
    memory = mc.memories.Titans(expansion=2)
    kernel = getattr(_carry, name)

    def always_the_first(tiles, layer, j, place=_carry._Tiles.place):
        return place(tiles, layer, 0 * j)

    def wrong(*args):
        with monkeypatch.context() as patched:
            patched.setattr(_carry._Tiles, "place", always_the_first)
            return kernel(*args)

    monkeypatch.setattr(gpu, name, wrong)
    with pytest.raises(AssertionError):
        compare(memory, make(memory, 16, 8), 1e-2)


@pytest.mark.usefixtures("every_platform")
@pytest.mark.parametrize(
    ("rule", "depth"),
    product(dict(titans=mc.memories.Titans, dla=mc.memories.DLA), [1, 2], turn=1),
)
def test_lowers_to_triton(rule, depth):
    memory = rule(depth=depth)

    def both(*arrays):
        return outputs(memory, arrays, "pallas_gpu")

    arrays = jax.eval_shape(lambda: make(memory, 96, 20))
    text = lowered_for_gpu(jax.jit(both), *arrays).as_text()
    assert "deep_update_forward" in text
    assert "deep_update_backward" in text
    # What interpreted kernels do not show: each pass but the first waits for the one before.
    assert str(jax.make_jaxpr(both)(*arrays)).count("debug_barrier") == 2 * (depth + 1)


@pytest.mark.slow
@pytest.mark.usefixtures("every_platform")
def test_transformations_lower_to_triton():
    """A barrier is an effect, which scans, remat and ``vmap`` must let pass."""
    memory = mc.memories.Titans(expansion=1)
    form, given, goes_on = make(memory, 16, 4)

    def total(form, given):
        @jax.checkpoint
        def body(given, _):
            after = deep_update(form, given, goes_on, loss=memory.loss, implementation="pallas_gpu")
            return after, None

        given, _ = jax.lax.scan(body, given, length=2)
        return jax.tree.reduce(lambda total, x: total + jnp.sum(x**2), given, 0.0)

    gradient = jax.vmap(jax.grad(total), in_axes=(0, None))
    forms = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), form)
    text = lowered_for_gpu(jax.jit(gradient), forms, given).as_text()
    assert "deep_update_forward" in text
    assert "deep_update_backward" in text


# Keys and rows of a chunk; hidden units of a tile, loads in flight; bytes of shared memory that
# jaxlib 0.10.2 compiles the backward pass of Titans to for an H200.
COMPILED = [
    ((64, 64), 16, 1, 20480),
    ((64, 64), 64, 1, 36864),
    ((128, 128), 16, 1, 73728),
    ((256, 64), 16, 1, 81920),
    ((256, 128), 16, 1, 147456),
    ((64, 64), 16, 2, 78336),
    ((64, 64), 64, 2, 164352),
    ((128, 32), 16, 2, 88320),
    ((128, 64), 16, 2, 147968),
    ((128, 64), 32, 2, 197120),
    ((256, 32), 16, 2, 170240),
    ((64, 64), 16, 3, 148480),
]


def shapes_of(k, m):
    return jax.eval_shape(lambda: make(mc.memories.Titans(), k, m))


@pytest.mark.parametrize(("chunk", "units", "stages", "wanted"), COMPILED)
def test_shared_memory_is_as_compiled(chunk, units, stages, wanted):
    form, given, _ = shapes_of(*chunk)
    got = gpu._shared_bytes(form, given, _carry.Blocks(units, 8, stages))
    assert wanted <= got < 1.5 * wanted


@pytest.mark.parametrize(("chunk", "stages"), [((128, 64), 2), ((256, 64), 1), ((256, 128), 1)])
def test_loads_in_flight_fit_into_shared_memory(chunk, stages):
    form, given, _ = shapes_of(*chunk)
    assert gpu.plan(form, given, _carry.Blocks(16, 8, 2)).num_stages == stages


def refused(memory, arrays, message):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda *arrays: outputs(memory, arrays, "pallas_gpu"), *arrays)


def test_what_no_program_can_hold_is_refused():
    refused(mc.memories.Titans(), shapes_of(512, 128), "needs 320 KiB, where there are 227")


@pytest.mark.usefixtures("x64")
def test_float64_is_not_served():
    memory = mc.memories.Titans()
    arrays = jax.eval_shape(lambda: make(memory, 16, 8, dtype=jnp.float64))
    refused(memory, arrays, "float64")
