"""Every implementation of the bank read against the reference, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine.read import blind_where_gates_are_zero
from memcache_jax.kernels import _table
from memcache_jax.kernels._triton import lowered_for_gpu
from memcache_jax.kernels.bank_read import _shared, bank_read, gpu, tpu, xla
from tests.cases import SCHEDULES, assert_close, normals, scheduled, value_and_vjp
from tests.covers import first_kept, kept_of, product
from tests.kernels.interpreters import (
    KERNELS,
    all_parallel,
    compare_to_reference,
    finds_races,
    runnable,
)

RAGGED = np.array([[-1, -1, -1], [2, -1, 0], [-1, -1, -1], [1, 1, 2], [0, -1, -1]])
READS = {
    "constant": mc.Constant(4).plan(4 * 6).reads,
    "two blocks": mc.Constant(4).plan(8).reads,
    "one block": mc.Constant(4).plan(4).reads,
    "one block, few tokens": np.array([[2, -1, 0]]),
    "ragged": RAGGED,
    "each row its own": jnp.stack([RAGGED, RAGGED[::-1]]),
}
MEMORIES = {
    "matrix": (mc.memories.LinearAttention(), [(4, 4)]),
    "deep": (mc.memories.Titans(expansion=3), [(4, 12), (12, 4)]),
}


def make(memory, reads, dtype):
    memory, shapes = MEMORIES[memory]
    normal, (blocks, slots), lead = normals(0, dtype), reads.shape[-2:], (2, 3)
    states = max(slots, 1) + 1
    bank = tuple(normal(*lead, states, *shape) * shape[0] ** -0.5 for shape in shapes)
    for matrix in bank:
        matrix[:, :, -1] = np.nan  # read by no block
    query, gates = normal(*lead, blocks, 5, 4), normal(*lead, blocks, 5, slots)
    bank = tuple(map(jnp.asarray, bank))
    return memory, (bank, jnp.asarray(query), jnp.asarray(gates))


@pytest.mark.parametrize(
    "reads",
    kept_of(READS, "constant", "one block, few tokens", "each row its own", fast=["ragged"]),
)
@pytest.mark.parametrize(
    ("memory", "precision"), [("matrix", "float64"), ("deep", "float64"), ("matrix", "float32")]
)
def test_xla_equals_reference(memory, reads, precision, monkeypatch):
    if reads is READS["one block, few tokens"]:
        monkeypatch.setattr(xla, "_SHARE", 0)  # five tokens are few
    with jax.enable_x64(precision == "float64"):
        tolerance = 1e-12 if precision == "float64" else 1e-6
        memory, arguments = make(memory, reads, jnp.dtype(precision))

        def outputs(implementation):
            return value_and_vjp(
                lambda bank, query, gates: bank_read(
                    memory.read, bank, query, gates, reads, implementation=implementation
                ),
                *arguments,
            )

        wanted = outputs("reference")
        for schedule in SCHEDULES:
            with scheduled(schedule):
                y, gradients = outputs("xla")
            assert_close(y, wanted[0], tolerance)
            assert_close(gradients, wanted[1], 2 * tolerance)


# The plan, the memory, heads, rows of a block, k and v, dtype.
CASES = {
    "constant": (mc.Constant(1).plan(5).reads, "matrix", 3, 5, 4, 8, "float32"),
    "one pair": (mc.Constant(1).plan(2).reads, "matrix", 1, 100, 96, 64, "float32"),
    "one block": (mc.Constant(1).plan(1).reads, "matrix", 2, 5, 4, 4, "float32"),
    "logarithmic": (mc.Logarithmic(1).plan(7).reads, "deep", 2, 1, 8, 8, "float32"),
    "ragged": (RAGGED, "deep", 2, 63, 20, 20, "float32"),
    "each row its own": (READS["each row its own"], "deep", 3, 5, 4, 4, "float32"),
    "bfloat16": (RAGGED, "matrix", 1, 5, 16, 16, "bfloat16"),
}


def make_case(reads, memory, heads, rows, k, v, dtype, batch=2):
    shapes = [(k, v)] if memory == "matrix" else [(k, 3 * k), (3 * k, k)]
    normal, lead = normals(1, np.float32), (batch, heads)
    states = reads.max(initial=0) + 2
    bank = tuple(normal(*lead, states, *shape) * shape[0] ** -0.5 for shape in shapes)
    for matrix in bank:
        matrix[:, :, -1] = np.nan  # read by no block
    arrays = (
        bank,
        normal(*lead, reads.shape[-2], rows, k),
        normal(*lead, reads.shape[-2], rows, reads.shape[-1]),
    )
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)


def operation(memory, reads):
    read = MEMORIES[memory][0].read
    return lambda bank, query, gates, **options: bank_read(
        read, bank, query, gates, reads, **options
    )


def compare_case(implementation, case):
    reads, memory, *_, dtype = case
    compare_to_reference(
        operation(memory, reads),
        implementation,
        *make_case(*case),
        tolerance={"float32": 1e-6, "bfloat16": 1e-2}[dtype],
        wanted_dtype=jnp.float32,
    )


@pytest.mark.parametrize(("case", "implementation"), product(CASES, KERNELS, turn=0))
def test_kernels_equal_reference(implementation, case):
    compare_case(implementation, case)


TILES = {
    "tpu, one state": ("pallas_tpu", {"rows": 128, "bank_bytes": 1}),
    "tpu, two states": ("pallas_tpu", {"rows": 128, "bank_bytes": 2 * 8 * 128 * 4}),
    "gpu": ("pallas_gpu", {"rows": 64, "num_warps": 4, "num_stages": 1}),
}


@pytest.mark.parametrize(
    ("tiles", "reads"),
    product(TILES, {"one": RAGGED, "rows": jnp.stack([RAGGED, RAGGED[::-1]])}, turn=0),
)
def test_tiles_of_rows_and_chunks_of_states(monkeypatch, tiles, reads):
    implementation, sizes = tiles
    monkeypatch.setitem(_table.TABLE, f"bank_read/{implementation}", {"default": sizes})
    compare_case(implementation, (reads, "matrix", 1, 150, 8, 8, "float32"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "reads"), [(16, RAGGED), (3, READS["each row its own"])], ids=["8 of 16", "1 of 3"]
)
def test_heads_that_tpu_kernels_do_not_hold_at_once(monkeypatch, heads, reads):
    sizes = {"rows": 128, "bank_bytes": 2**12}
    monkeypatch.setitem(_table.TABLE, "bank_read/pallas_tpu", {"default": sizes})
    case = (reads, "matrix", heads, 150, 8, 8, "float32")
    bank, query, _ = make_case(*case)
    states, most = bank[0].shape[2], 2**20
    monkeypatch.setattr(tpu, "vmem_left", lambda needed: max(heads // 2 * most - needed, 0))
    monkeypatch.setattr(tpu, "tile_bytes", lambda shape: most // (4 * states + 20))
    together, chunk, _ = tpu._plan(bank, query, 3, 128, 2**12)
    assert (together, chunk) == ((8, states) if heads == 16 else (1, 1))
    compare_case("pallas_tpu", case)


def test_tpu_kernels_read_and_write_rows_in_the_dtype_of_the_query():
    bank, query, gates = make_case(RAGGED, "matrix", 2, 5, 16, 16, "float32")
    narrow = query.astype(jnp.bfloat16)
    read = operation("matrix", RAGGED)
    with runnable("pallas_tpu"):
        y, gradients = value_and_vjp(
            lambda *xs: read(*xs, implementation="pallas_tpu"), bank, narrow, gates
        )
    assert y.dtype == gradients[1].dtype == jnp.bfloat16
    assert gradients[0][0].dtype == gradients[2].dtype == jnp.float32
    exact = bank, narrow.astype(jnp.float32), gates
    wanted = value_and_vjp(lambda *xs: read(*xs, implementation="reference"), *exact)
    assert_close(y, wanted[0], 1e-2)
    assert_close(gradients, wanted[1], 2e-2)


@pytest.mark.parametrize(
    ("implementation", "name"), product(["xla", *KERNELS], ["ragged", "each row its own"], turn=1)
)
def test_empty_slots_are_not_read(implementation, name):
    reads = READS[name]
    memory, (bank, query, gates) = make("deep", reads, jnp.float32)
    empty = (reads < 0)[..., None, :]
    poisoned = jnp.where(empty[:, None] if reads.ndim == 3 else empty, jnp.nan, gates)
    with runnable(implementation):
        y, (_, _, d_gates) = value_and_vjp(
            lambda *xs: operation("deep", reads)(*xs, implementation=implementation),
            *(bank, query, poisoned),
        )
    assert_close(y, bank_read(memory.read, bank, query, gates, reads), 1e-6)
    np.testing.assert_array_equal(y[0, :, 0], 0.0)
    np.testing.assert_array_equal(d_gates[0, :, 0], 0.0)


@pytest.mark.parametrize(
    ("implementation", "error"), product(KERNELS, ["slot", "state", "block"], turn=0)
)
def test_a_wrong_pair_is_seen(monkeypatch, implementation, error):
    module = {"pallas_tpu": tpu, "pallas_gpu": gpu}[implementation]

    def make_runs(reads, *args, **options):
        runs = _shared.make_runs(reads, *args, **options)
        if error == "block":
            return runs._replace(block=np.roll(runs.block, 1), begin=np.roll(runs.begin, 1))
        wrong = runs.pairs ^ (1 if error == "slot" else _shared.MAX_SLOTS)
        return runs._replace(pairs=np.append(runs.pairs[:-1], wrong[-1]))

    monkeypatch.setattr(module, "make_runs", make_runs)
    with pytest.raises(AssertionError, match=r"> 1e-06|> 2e-06|nan"):
        compare_case(implementation, CASES["constant"])


@pytest.mark.slow
def test_no_two_cores_write_one_block(monkeypatch):
    def run(batch):
        reads = mc.Constant(1).plan(3).reads
        arrays = make_case(reads, "matrix", 2, 5, 4, 4, "float32", batch)
        read = operation("matrix", reads)
        return finds_races(
            lambda *xs: value_and_vjp(lambda *xs: read(*xs, implementation="pallas_tpu"), *xs),
            *arrays,
        )

    assert not run(batch=2)
    monkeypatch.setattr(tpu, "tpu_call", all_parallel(tpu.tpu_call))
    assert run(batch=1)


@pytest.mark.slow
def test_under_the_transformations():
    implementation = "pallas_tpu"
    reads, memory, *_ = CASES["ragged"]
    bank, query, gates = make_case(reads, memory, 1, 5, 4, 4, "float32", batch=4)
    read = operation(memory, reads)

    def gated_square(*arrays, implementation):
        return jnp.sum(read(*arrays, implementation=implementation) ** 2)

    by_reference = functools.partial(gated_square, implementation="reference")
    wanted = jax.jit(jax.grad(by_reference, argnums=(0, 1, 2)))(bank, query, gates)
    loss = functools.partial(gated_square, implementation=implementation)

    def by_vmap(*arrays):
        split = jax.tree.map(lambda x: x[:, None], arrays)
        return jax.vmap(lambda *xs: loss(*xs))(*split).sum()

    def by_scan(*arrays):
        split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), arrays)
        step = jax.checkpoint(lambda total, xs: (total + loss(*xs), None))
        return jax.lax.scan(step, 0.0, split)[0]

    def by_shard_map(*arrays):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
        spec = jax.sharding.PartitionSpec("data")
        shard = jax.shard_map(
            lambda *xs: loss(*xs)[None],
            mesh=mesh,
            in_specs=(spec, spec, spec),
            out_specs=spec,
            check_vma=False,
        )
        return shard(*arrays).sum()

    with runnable(implementation):
        for function in (by_vmap, by_scan, by_shard_map):
            got = jax.jit(jax.grad(function, argnums=(0, 1, 2)))(bank, query, gates)
            assert_close(got, wanted, 2e-6)


@pytest.mark.parametrize(
    ("implementation", "memory"), product(["xla", *KERNELS], [*MEMORIES], turn=0)
)
def test_rows_that_are_blind_to_a_state(implementation, memory):
    bank, query, gates = make_case(RAGGED, memory, 2, 5, 4, 4, "float32")
    seen = (RAGGED != 2)[None, None, :, None] & (np.arange(5) % 2 == 0)[None, None, None, :, None]
    gates = jnp.where(seen, gates, 0)
    read = MEMORIES[memory][0].read

    def outputs(read, number, implementation):
        holds = tuple(matrix.at[:, :, 2:].set(number) for matrix in bank)
        y, gradients = value_and_vjp(
            lambda bank, query, gates: bank_read(
                read, bank, query, gates, RAGGED, implementation=implementation
            ),
            *(holds, query, gates),
        )
        return y, *gradients[:2], jnp.where(seen, gradients[2], 0)

    with runnable(implementation):
        got = outputs(blind_where_gates_are_zero(read), jnp.nan, implementation)
    assert_close(got, outputs(read, 0.0, "reference"), 2e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("implementation", "name"), product(KERNELS, ["ragged", "each row its own"], turn=0)
)
def test_float32_where_integers_have_64_bits(implementation, name):
    compare_case(implementation, CASES[name])


def refused(implementation, blocks, states, rows_of_a_batch=None):
    """What an implementation says of a plan in which each block reads one state."""
    reads = np.full((blocks, 1), states - 1)
    shapes = ((1, 1, states, 8, 8), (1, 1, blocks, 1, 8), (1, 1, blocks, 1, 1))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if rows_of_a_batch:
        reads = jnp.asarray(reads)[None]
    read = operation("matrix", reads)
    with pytest.raises(NotImplementedError) as error:
        jax.eval_shape(
            lambda bank, *rest: read((bank,), *rest, implementation=implementation), *shapes
        )
    return str(error.value)


def test_states_too_many_to_be_numbered_are_refused():
    assert "65537 states at once, more than 65536" in refused("pallas_gpu", 2, 65537)
    message = refused("pallas_gpu", 2**15, 2**16, rows_of_a_batch=True)
    assert "32768 blocks times 65536 states" in message


def test_plans_beyond_a_tpus_scalar_memory_are_refused():
    assert "scalar memory: lists of 260001 numbers" in refused("pallas_tpu", 65000, 3)


def test_a_packed_pair_of_the_last_state_is_not_negative():
    reads = np.array([[2**16 - 1]])
    runs = _shared.make_runs(reads, 2**16, 2**16, by_chunk=False)
    assert [int(x) for x in _shared.unpack(jnp.asarray(runs.pairs)[0])] == [2**16 - 1, 0]
    assert runs.pairs[0] > 0


@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_take_no_float64(implementation):
    with jax.enable_x64(True):
        memory, arguments = make("matrix", RAGGED, jnp.float64)
        with pytest.raises(NotImplementedError, match="float64"):
            bank_read(memory.read, *arguments, RAGGED, implementation=implementation)


def test_triton_tells_of_states_too_large():
    case = (RAGGED, "deep", 1, 16, 128, 128, "float32")
    with pytest.raises(NotImplementedError, match="registers"):
        operation("deep", RAGGED)(*make_case(*case), implementation="pallas_gpu")


@pytest.mark.usefixtures("every_platform")
@pytest.mark.parametrize("k", first_kept(2, [96, 128, 32, 64]))
def test_triton_kernels_lower(k):
    reads = mc.Constant(256).plan(4 * 256).reads
    arrays = jax.eval_shape(lambda: make_case(reads, "matrix", 2, 256, k, k, "float32"))
    read = operation("matrix", reads)
    function = jax.jit(
        lambda *xs: jax.vjp(lambda *xs: read(*xs, implementation="pallas_gpu"), *xs)[1](xs[1])
    )
    text = lowered_for_gpu(function, *arrays).as_text()
    for kernel in ("backward_rows", "backward_bank"):
        assert f"bank_read_{kernel}" in text


@pytest.mark.slow
def test_work_grows_with_the_pairs_that_are_read():
    from experiments._flops import count_flops

    def flops(blocks):
        memory, arguments = make("matrix", mc.Constant(4).plan(4 * blocks).reads, jnp.float32)
        reads = mc.Constant(4).plan(4 * blocks).reads
        return count_flops(lambda b, q, g: bank_read(memory.read, b, q, g, reads), *arguments)

    one_pair = flops(2)
    assert flops(8) == 28 * one_pair  # 8 x 7 / 2 pairs, with none to fill up
    assert flops(9) == 36 * one_pair
    assert flops(17) == 136 * one_pair


def test_unknown_implementation():
    memory, arguments = make("matrix", READS["constant"], jnp.float32)
    with pytest.raises(ValueError, match="got 'cuda'"):
        bank_read(memory.read, *arguments, READS["constant"], implementation="cuda")
