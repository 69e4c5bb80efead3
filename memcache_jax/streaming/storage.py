"""How a cache holds its states: dtypes narrower than the arithmetic, and the host's memory."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Float, Int
from memcache_jax.streaming.protocol import take_rows

Placement = Literal["device", "host"]
PLACEMENTS = get_args(Placement)
CACHE_DTYPES = ("float64", "float32", "bfloat16", "int8")
_LINE = 128


class Quantized(NamedTuple):
    """A matrix of int8, and the factor of each of its rows."""

    values: Any  # (..., in, out)
    scale: Any  # (..., in, 1)


def pack(matrices: Any, dtype: DTypeLike) -> Any:
    """The matrices as a bank stores them: int8 in steps of 1/127 of a row's largest entry."""
    if jnp.dtype(dtype) != jnp.int8:
        return jax.tree.map(lambda x: x.astype(dtype), matrices)

    def quantize(x: Float[Array, "... in out"]) -> Quantized:
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        values = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
        return Quantized(values, scale.astype(jnp.float32))

    return jax.tree.map(quantize, matrices)


def unpack(stored: Any, dtype: DTypeLike) -> Any:
    """The matrices in the dtype of the arithmetic."""

    def widen(x: Any) -> Array:
        if isinstance(x, Quantized):
            return x.values.astype(dtype) * x.scale.astype(dtype)
        return x.astype(dtype)

    return jax.tree.map(widen, stored, is_leaf=lambda x: isinstance(x, Quantized))


class Storage:
    """Packed matrices of cached states, in arrays (b, h, slots, in, out) on the device.

    Several layers may share arrays (layers, b, h, slots, in, out).

    Attributes:
      num_slots: slots of a row.
      state: the packed matrices (h, in, out) of one state, or their shapes.
      first: the number of the layer; None where there is one alone.
    """

    def __init__(self, num_slots: int, state: Any, first: Any = None) -> None:
        self.num_slots, self.state, self.first = num_slots, state, first

    @property
    def made_again(self) -> "Callable[[Any], Storage]":
        """Makes this storage for another layer number, without holding this one's arrays."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.state)
        return functools.partial(type(self), self.num_slots, shapes)

    def empty(self, rows: int, *layers: int) -> Any:
        """Allocates the arrays, with zeros."""

        def zeros(x: Any) -> Array:
            return jnp.zeros((*layers, rows, len(x), self.num_slots, *x.shape[1:]), x.dtype)

        return jax.tree.map(zeros, self.state)

    def all(self, arrays: Any) -> Any:
        """The states (b, h, slots, ...) of all slots."""
        if self.first is None:
            return arrays
        return jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, self.first, keepdims=False), arrays
        )

    def take(self, arrays: Any, slots: Int[Array, "b h n"]) -> Any:
        """The states (b, h, n, ...) in these slots of each head."""

        def take(kept: Array) -> Array:
            one = self._one_state(kept)
            numbers = lax.GatherDimensionNumbers(
                offset_dims=tuple(range(3, 3 + len(one))),
                collapsed_slice_dims=self._picked,
                start_index_map=self._picked,
                operand_batching_dims=self._divided,
                start_indices_batching_dims=(0, 1),
            )
            sizes = *[1] * (kept.ndim - len(one)), *one
            return lax.gather(kept, self._places(slots), numbers, sizes, mode="clip")

        return jax.tree.map(take, arrays)

    def put(self, arrays: Any, states: Any, place: Int[Array, "b n"]) -> Any:
        """The arrays with states (b, h, n, ...) put into these slots; ``num_slots`` drops one."""

        def put(kept: Array, new: Array) -> Array:
            numbers = lax.ScatterDimensionNumbers(
                update_window_dims=tuple(range(3, new.ndim)),
                inserted_window_dims=self._picked,
                scatter_dims_to_operand_dims=self._picked,
                operand_batching_dims=self._divided,
                scatter_indices_batching_dims=(0, 1),
            )
            slots = jnp.broadcast_to(place[:, None], new.shape[:3])
            return lax.scatter(
                *(kept, self._places(slots), new.astype(kept.dtype), numbers),
                mode="drop",
                unique_indices=True,
            )

        return jax.tree.map(put, arrays, states)

    def take_rows(self, arrays: Any, rows: Int[Array, "n"], axis: int = 0) -> Any:
        """The arrays of these rows alone, which are along ``axis``."""
        return take_rows(arrays, rows, axis)

    # Rows and heads are batch axes of a gather, which the compiler can then divide.

    @property
    def _divided(self) -> tuple[int, ...]:
        return (0, 1) if self.first is None else (1, 2)

    @property
    def _picked(self) -> tuple[int, ...]:
        return (2,) if self.first is None else (0, 3)

    def _one_state(self, kept: Array) -> tuple[int, ...]:
        return kept.shape[self._picked[-1] + 1 :]

    def _places(self, slots: Int[Array, "b h n"]) -> Int[Array, "b h n indices"]:
        layer = () if self.first is None else (jnp.broadcast_to(self.first, slots.shape),)
        return jnp.stack([*layer, slots], axis=-1)


class HostStorage(Storage):
    """Arrays (b * (slots + 1) * h, lines, 128) on the host, of flattened and padded matrices.

    In this layout TPUs keep a state in one piece and can copy it alone. Each row has one slot more,
    for states that are dropped.
    """

    def empty(self, rows: int, *layers: int) -> Any:
        """Allocates the arrays, with zeros."""
        count = rows * (self.num_slots + 1)

        def zeros(x: Any) -> Array:
            lines = jax.eval_shape(_to_lines, x)
            shape = *layers, count * len(x), *lines.shape[1:]
            return _to_host(jnp.zeros(shape, lines.dtype))

        return jax.tree.map(zeros, self.state)

    def take(self, arrays: Any, slots: Int[Array, "b h n"]) -> Any:
        """As ``Storage.take``."""
        batch, heads, _ = slots.shape
        rows = jnp.arange(batch)[:, None, None] * (self.num_slots + 1)
        places = (rows + slots) * heads + jnp.arange(heads)[None, :, None]

        def one(kept: Array, place: Array) -> Array:
            # A slice copies one state from the host; a gather copies the whole bank.
            sizes = *[1] * (kept.ndim - 2), *kept.shape[-2:]
            state = lax.dynamic_slice(kept, self._begin(place), sizes)
            return jax.device_put(state, jax.memory.Space.Device).reshape(kept.shape[-2:])

        def shaped(x: Array, like: Any) -> Array:
            states = _from_lines(x, like.shape[1:], like.dtype)
            return states.reshape(*slots.shape, *like.shape[1:])

        lines = lax.map(lambda i: jax.tree.map(lambda x: one(x, i), arrays), places.reshape(-1))
        return jax.tree.map(shaped, lines, self.state)

    def put(self, arrays: Any, states: Any, place: Int[Array, "b n"]) -> Any:
        """As ``Storage.put``."""

        def put(kept: Array, new: Array) -> Array:
            rows, heads, tracks = new.shape[:3]
            lines = _to_lines(new.reshape(rows * heads * tracks, *new.shape[3:]))
            new = _to_host(lines.reshape(rows, heads, tracks, *lines.shape[1:]))
            for row in range(rows):
                for track in range(tracks):
                    slot = row * (self.num_slots + 1) + place[row, track]
                    one = new[row, :, track].reshape(
                        *[1] * (kept.ndim - 3), heads, *kept.shape[-2:]
                    )
                    kept = lax.dynamic_update_slice(kept, one, self._begin(slot * heads))
            return kept

        return jax.tree.map(put, arrays, states)

    def take_rows(self, arrays: Any, rows: Int[Array, "n"], axis: int = 0) -> Any:
        """As ``Storage.take_rows``."""
        size = (self.num_slots + 1) * len(jax.tree.leaves(self.state)[0])

        def take(kept: Array) -> Array:
            shape = *kept.shape[:axis], len(rows) * size, *kept.shape[axis + 1 :]
            new = _to_host(jnp.zeros(shape, kept.dtype))
            for i in range(len(rows)):
                row = lax.dynamic_slice_in_dim(kept, rows[i] * size, size, axis)
                new = lax.dynamic_update_slice_in_dim(new, row, i * size, axis)
            return new

        return jax.tree.map(take, arrays)

    def _begin(self, place: Array) -> tuple[Any, ...]:
        layer = () if self.first is None else (self.first,)
        return tuple(jnp.asarray(x, jnp.int32) for x in (*layer, place, 0, 0))


def _to_lines(x: Array) -> Array:
    """(n, ...) as (n, lines, 128); int8 in fours as int32, because TPUs cannot compile int8."""
    flat, packed = x.reshape(len(x), -1), 4 if x.dtype == jnp.int8 else 1
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % (packed * _LINE))))
    if packed > 1:
        flat = lax.bitcast_convert_type(flat.reshape(len(x), -1, packed), jnp.int32)
    return flat.reshape(len(x), -1, _LINE)


def _from_lines(lines: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """The inverse of ``_to_lines``."""
    flat = lines.reshape(len(lines), -1)
    if flat.dtype != dtype:
        flat = lax.bitcast_convert_type(flat, dtype).reshape(len(lines), -1)
    return flat[:, : math.prod(shape)].reshape(-1, *shape)


def _to_host(x: Array) -> Array:
    return jax.device_put(x, jax.memory.Space.Host)
