"""The states in the slots of a cache, as the engine reads them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Bool, Float
from memcache_jax.engine.read import ArrayBank, Bank
from memcache_jax.engine.types import OfBlocks, OfTokens, Selection
from memcache_jax.memories import Memory
from memcache_jax.streaming import storage
from memcache_jax.streaming.cache import Cache
from memcache_jax.streaming.exact import matrices_of


@dataclasses.dataclass(frozen=True)
class SlotBank(Bank):
    """The states in a cache's slots.

    Attributes:
      memory: the rule.
      cache: what holds them.
      dtype: in which they are read.
      ended: which states of a row, (b, slots), there were before its tokens; others are read as
        zeros. None for all.
    """

    memory: Memory
    cache: Cache
    dtype: Any
    ended: Bool[Array, "b slots"] | None = None

    def read(
        self, query: Float[Array, "b h n c k"], selection: Selection
    ) -> Float[Array, "b h n c v"]:
        """Reads all slots, or copies of the states that each token selects."""
        return self._read(lambda bank, *args: bank.read(*args), query, selection)

    def read_layer(
        self, layer: int, x: Float[Array, "b h n c in"], selection: Selection
    ) -> Float[Array, "b h n c out"]:
        """As ``read``, for one layer."""
        return self._read(lambda bank, *args: bank.read_layer(layer, *args), x, selection)

    def _read(
        self, read: Callable[..., Array], x: Float[Array, "b h n c in"], selection: Selection
    ) -> Float[Array, "b h n c out"]:
        """``read(bank, rows, selection)`` by the rows x, of a bank of states that they need."""
        config, size = self.cache.config, x.shape[3]
        slots = config.slots.num_slots
        few = isinstance(selection, OfTokens) and size * selection.states.shape[-1] < slots
        if config.placement == "host" or few:
            bank, near, rows = self._near(x, selection)
            y = read(bank, rows, near)
            return y.reshape(*x.shape[:-1], y.shape[-1])

        matrices = storage.unpack(self.cache.storages[0].all(matrices_of(self.cache)), self.dtype)
        if self.ended is not None:
            ended = self.ended[:, None, :, None, None]
            matrices = jax.tree.map(lambda x: jnp.where(ended, x, 0), matrices)
        return read(ArrayBank(self.memory, matrices, None), x, selection)

    def _near(self, x: Array, selection: Selection) -> tuple[ArrayBank, Selection, Array]:
        """A bank of copies, and the selection and rows that read it."""
        cache, (batch, heads, _, size) = self.cache, x.shape[:4]
        states = jnp.asarray(selection.states)
        if isinstance(selection, OfBlocks):
            states = jnp.where(selection.gates != 0, states[:, None, :, None], -1)
        # Each token becomes a block of its own, with its states side by side.
        states = states.reshape(batch, heads, -1)
        near = cache.storages[0].take(matrices_of(cache), jnp.maximum(states, 0))
        matrices = storage.unpack(near, self.dtype)
        # A slot that is not read may hold NaN, and its gate of zero would not hide it.
        matrices = jax.tree.map(lambda m: jnp.where(states[..., None, None] >= 0, m, 0), matrices)
        each = np.arange(states.shape[-1]).reshape(1, size, -1)
        gates, live = selection.gates[:, :, 0, :, None], selection.live[:, :, 0, :, None]
        rows = x[:, :, 0, :, None]
        return ArrayBank(self.memory, matrices, None), OfBlocks(each, gates, live), rows
