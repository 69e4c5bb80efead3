"""Attention of tokens in windows to themselves, to what a memory recalls and to learned tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.nn.attend import Turn
from memcache_jax.nn.attention import Attention
from memcache_jax.nn.windows import attend_window
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.names import partitioned


class ContextAttention(Attention):
    """The attention of ``MemoryAsContext``; its input is x and what is recalled, (b, t, 2 d).

    A token has two keys and two values in each head, side by side as 2 k channels.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        window: int,
        num_persistent: int,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_heads, window=window, rngs=rngs, **options)
        self.in_features = 2 * in_features
        self.num_persistent = num_persistent
        if num_persistent:  # Orbax saves no empty arrays
            init = partitioned(jax.nn.initializers.normal(0.02), None, "heads", None)
            shape = num_persistent, num_heads, self.head_dim
            self.persistent_key, self.persistent_value = (
                nnx.Param(init(rngs.params(), shape, self.param_dtype)) for _ in range(2)
            )

    def _whole(
        self,
        x: Float[Array, "b t dd"],
        document_ids: Int[Array, "b t"] | None,
        mask: Bool[Array, "_ _ t t"] | None = None,
    ) -> Float[Array, "b t d"]:
        if mask is not None:
            raise ValueError("attention to a memory's context takes no mask")
        if 0 in x.shape[:2]:
            return self.out(self.value(x[..., : self.in_features // 2]))
        (query, key, value), division = self._rows(x, (document_ids, "b t"))
        attend = functools.partial(attend_windows, window=self.window, turn=self._turn)
        args, row = (query, key, value, self._persistent(), document_ids), "b t h ."
        if division is None:
            return self._output(x, attend(*args))
        if x.shape[1] % (division.parts * self.window):
            division = division.whole("t")  # parts would end within windows
        letters = row, row, row, (". h .", ". h ."), "b t"
        return self._output(x, division.run(attend, args, letters, row))

    def _rows(
        self, x: Float[Array, "b t dd"], *others: tuple[Any, str]
    ) -> tuple[list[Array], Division | None]:
        own, recalled = jnp.split(x, 2, axis=-1)
        rows, division = super()._rows(own, *others)
        of_recalled = [linear(recalled) for linear in (self.key, self.value)]
        if division is not None:
            of_recalled = [division.lay(row, "b t h") for row in of_recalled]
        pairs = (
            jnp.concatenate([row, other.reshape(row.shape)], axis=-1)
            for row, other in zip(rows[1:], of_recalled, strict=True)
        )
        return [rows[0], *pairs], division

    def _persistent(self) -> tuple[Array, Array]:
        if not self.num_persistent:
            none = jnp.zeros((0, self.num_heads, self.head_dim), self.param_dtype)
            return none, none
        return self.persistent_key[...], self.persistent_value[...]

    def _turn(
        self, rows: Float[Array, "b t h kk"], position: Int[Array, "_ t"] | None
    ) -> Float[Array, "b t h kk"]:
        place = jnp.arange(rows.shape[1])[None] if position is None else position
        turned = (
            super(ContextAttention, self)._turn(part, place % self.window)
            for part in jnp.split(rows, rows.shape[-1] // self.head_dim, axis=-1)
        )
        return jnp.concatenate([*turned], axis=-1)

    @property
    def _kept_shape(self) -> tuple[int, int]:
        return self.num_kv_heads, 2 * self.head_dim


def attend_windows(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h kk"],
    value: Float[Array, "b t h kk"],
    persistent: tuple[Float[Array, "p h k"], Float[Array, "p h k"]],
    document: Int[Array, "b t"] | None,
    *,
    window: int,
    turn: Turn,
) -> Float[Array, "b t h k"]:
    """Attention of each token to its window so far.

    A window begins at every multiple of ``window`` in the row, as segments do, and with a document.
    """
    place = jnp.arange(query.shape[1])[None]
    begins = place % window == 0
    if document is not None:
        begins |= jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)))
    number = jnp.cumsum(begins, axis=1)
    place -= lax.cummax(jnp.where(begins, place, 0), axis=1)
    rows = turn(query, place), turn(key, place), value, jnp.zeros(1, jnp.int32), number
    return attend_window(*rows, window=window, persistent=persistent)
