"""Programs to compile for TPUs: every kernel, forward and backward, with little around it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import memcache_jax as mc
from memcache_jax.engine.read import blind_where_gates_are_zero
from memcache_jax.kernels.affine_update import AffineChunk, affine_update
from memcache_jax.kernels.bank_read import bank_read
from memcache_jax.kernels.chunk_update import Edges, chunk_update
from memcache_jax.kernels.grouped_read import tpu as grouped_read
from memcache_jax.kernels.relevance import relevance
from memcache_jax.kernels.ssc_route import ssc_route
from memcache_jax.memories.deep_chunk import DeepState

_BLOCKS, _ROWS, _K, _TOP_K = 64, 256, 128, 4
_READS = mc.Constant(_ROWS).plan(_BLOCKS * _ROWS).reads
_LINEAR, _DEEP = mc.memories.LinearAttention(), mc.memories.Titans()
_CHUNKS, _M = 4, 64  # a segment of 256 tokens


def tpu_cases() -> dict[str, tuple[Callable[..., Any], tuple]]:
    """Returns functions that run kernels forward and backward, and their arguments' shapes."""
    rows = _shapes((_BLOCKS, _ROWS, _K), (_BLOCKS, _ROWS, _BLOCKS - 1))
    largest = _shapes((_BLOCKS, _ROWS, 256), (_BLOCKS, _ROWS, _BLOCKS - 1), dtype=jnp.bfloat16)
    groups = (_bank((_K, _K)), *_shapes((4 * _BLOCKS, _ROWS, _K), (4 * _BLOCKS, _ROWS)))
    return {
        "bank_read": (_read_bank(_LINEAR.read), (_bank((_K, _K)), *rows)),
        "bank_read, documents": (
            _read_bank(blind_where_gates_are_zero(_DEEP.read)),
            (_bank((_K, 4 * _K), (4 * _K, _K)), *rows),
        ),
        "bank_read, largest": (_read_bank(_DEEP.read), (_bank((256, 1024), (1024, 256)), *largest)),
        "grouped_read": (
            _read_groups,
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), groups),
        ),
        "ssc_route": (
            _with_vjp(_route),
            _shapes((_BLOCKS, _ROWS, _K), (_BLOCKS - 1, _K), (_BLOCKS, _ROWS)),
        ),
        "affine_update, decay": _affine(64, erases=False),
        "affine_update, delta": _affine(128, erases=True),
        "relevance": (_with_vjp(_relevance), _shapes(*[(16, 512, _K)] * 2, dtype=jnp.bfloat16)),
        "chunk_update, Titans": _titans(128),
        "chunk_update, Titans by heads": _titans_by_heads(),
        "chunk_update, largest": _titans(256),
    }


def _shapes(*every: tuple[int, ...], dtype: Any = jnp.float32) -> tuple:
    """Returns shapes with one batch row and two heads."""
    return tuple(jax.ShapeDtypeStruct((1, 2, *shape), dtype) for shape in every)


def _bank(*layers: tuple[int, int]) -> tuple:
    return _shapes(*((_BLOCKS - 1, *layer) for layer in layers))


def _with_vjp(function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any) -> Any:
        y, pull = jax.vjp(function, *arguments)
        return y, pull(jax.tree.map(jnp.cos, y))

    return both


def _read_bank(read: Callable[..., Any]) -> Callable[..., Any]:
    return _with_vjp(
        lambda bank, query, gates: bank_read(
            read, bank, query, gates, _READS, implementation="pallas_tpu"
        )
    )


def _read_groups(bank: Any, rows: Any, weights: Any) -> Any:
    """Runs the kernels alone: the sorts and gathers around them take minutes to compile.

    Some TPUs run these gathers on separate cores, in programs that cannot be printed.
    """
    kernels = grouped_read._Kernels(_LINEAR.read, _ROWS, _K, 0)
    state = jax.lax.broadcasted_iota(jnp.int32, rows.shape[:2], 1) // 4
    y = kernels.forward(state, bank, rows, weights)
    return y, kernels.backward(state, bank, rows, weights, jnp.cos(y))


def _route(connector: Any, pooled: Any, online: Any) -> Any:
    return ssc_route(connector, pooled, online, _READS, _TOP_K, implementation="pallas_tpu")[:2]


def _relevance(connector: Any, key: Any) -> Any:
    return relevance(connector, key, pooling="mean", implementation="pallas_tpu")


def _units(*shape: int) -> Any:
    """Returns a shape with eight memories."""
    return jax.ShapeDtypeStruct((8, *shape), jnp.float32)


def _affine(keys: int, *, erases: bool) -> tuple[Callable[..., Any], tuple]:
    """Updates matrices (keys, keys) with given chunk maps."""
    form = AffineChunk(
        decay=_units(_CHUNKS, keys),
        value=_units(_CHUNKS, _M, keys),
        key=_units(_CHUNKS, _M, keys),
        query=_units(_CHUNKS, _M, keys),
        scores=_units(_CHUNKS, _M, _M),
        erase=_units(_CHUNKS, _M, keys) if erases else None,
    )

    def update(state: Any, form: Any) -> Any:
        return affine_update(
            lambda rows: rows, state, form, batch_dims=1, keep=_CHUNKS, implementation="pallas_tpu"
        )

    return _with_vjp(update), (_units(keys, keys), form)


def _titans(keys: int) -> tuple[Callable[..., Any], tuple]:
    memory = mc.memories.Titans(chunk_size=_M)
    update = functools.partial(_write_and_read, memory, batch_dims=1)
    shapes = memory.weight_shapes(keys, keys)
    weights = {name: jnp.zeros(size) for name, size in shapes.items()}
    state = jax.eval_shape(lambda: memory.init(weights, keys, keys, jnp.float32))
    rows = (
        *[_units(_CHUNKS, _M, keys)] * 3,
        {name: _units(_CHUNKS, _M) for name in memory.controls},
    )
    return _with_vjp(update), (jax.tree.map(lambda x: _units(*x.shape), state), rows)


def _titans_by_heads() -> tuple[Callable[..., Any], tuple]:
    """Two runs of eight heads, which share initial weights; tokens in bfloat16, heads inside."""
    memory = mc.memories.Titans(chunk_size=_M)
    batch = (1, 8, 2)

    def at_rest(weights: Any) -> DeepState:
        return DeepState(weights, jax.tree.map(jnp.zeros_like, weights))

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = (
        *[array(*batch, _CHUNKS, _M, _K)] * 3,
        {name: array(*batch, _CHUNKS, _M) for name in memory.controls},
    )
    update = functools.partial(
        *(_write_and_read, memory),
        batch_dims=3,
        late=(True, *jax.tree.map(lambda x: False, rows[1:])),
        edges=Edges(at_rest, lambda state: state.weights),
    )
    shapes = memory.weight_shapes(_K, _K).values()
    weights = tuple(array(1, 8, 1, *size[::-1], dtype=jnp.float32) for size in shapes)
    return _with_vjp(update), (weights, rows)


def _write_and_read(memory: Any, state: Any, rows: Any, **options: Any) -> Any:
    def chunk(state: Any, rows: Any) -> Any:
        query, key, value, controls = jax.tree.map(lambda x: x.astype(jnp.float32), rows)
        end, view = memory.write(state, state, key, value, controls)
        return end, memory.read_online(view, query).astype(rows[0].dtype)

    return chunk_update(chunk, state, rows, implementation="pallas_tpu", **options)
