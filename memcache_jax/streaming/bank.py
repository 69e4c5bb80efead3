"""The states in the slots of a cache, as the engine reads them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float
from memcache_jax.engine.read import ArrayBank, Bank
from memcache_jax.engine.types import OfBlocks, OfTokens, Selection
from memcache_jax.memories import Memory
from memcache_jax.streaming import storage
from memcache_jax.streaming.cache import Cache
from memcache_jax.streaming.exact import matrices_of


@dataclasses.dataclass(frozen=True)
class SlotBank(Bank):
    """The states in a cache's slots; reads in ``dtype`` unpack only those that they need.

    The others of a row are zero where not all have ``ended``, (b, slots), before its tokens.
    """

    memory: Memory
    cache: Cache
    dtype: Any
    ended: Any = None

    def read(
        self, query: Float[Array, "b h n c k"], selection: Selection
    ) -> Float[Array, "b h n c v"]:
        """Reads all slots, or copies of the states that each token selects."""
        bank, near, rows = self._near(query, selection)
        y = bank.read(rows, near)
        return y.reshape(*query.shape[:-1], y.shape[-1])

    def read_layer(
        self, layer: int, x: Float[Array, "b h n c in"], selection: Selection
    ) -> Float[Array, "b h n c out"]:
        """As ``read``, for one layer."""
        bank, near, rows = self._near(x, selection)
        y = bank.read_layer(layer, rows, near)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _near(self, x: Array, selection: Selection) -> tuple[ArrayBank, Selection, Array]:
        """An unpacked bank, and the selection and rows that read it."""
        cache, (batch, heads, _, size) = self.cache, x.shape[:4]
        stored, slots = cache.storages[0], cache.config.slots.num_slots
        few = isinstance(selection, OfTokens) and size * selection.states.shape[-1] < slots
        if cache.config.placement == "device" and not few:
            matrices = storage.unpack(stored.all(matrices_of(cache)), self.dtype)
            if self.ended is not None:
                ended = self.ended[:, None, :, None, None]
                matrices = jax.tree.map(lambda x: jnp.where(ended, x, 0), matrices)
            return ArrayBank(self.memory, matrices, None), selection, x
        states = jnp.asarray(selection.states)
        if isinstance(selection, OfBlocks):
            states = jnp.where(selection.gates != 0, states[:, None, :, None], -1)
        # Each token becomes a block of its own, with its states side by side.
        states = states.reshape(batch, heads, -1)
        near = stored.take(matrices_of(cache), jnp.maximum(states, 0))
        matrices = storage.unpack(near, self.dtype)
        # A slot that is not read may hold NaN, and its gate of zero would not hide it.
        matrices = jax.tree.map(lambda m: jnp.where(states[..., None, None] >= 0, m, 0), matrices)
        each = np.arange(states.shape[-1]).reshape(1, size, -1)
        gates, live = selection.gates[:, :, 0, :, None], selection.live[:, :, 0, :, None]
        rows = x[:, :, 0, :, None]
        return ArrayBank(self.memory, matrices, None), OfBlocks(each, gates, live), rows
