"""How tokens read: the live memory right after their own writes, and a bank of cached states."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Float, Matrices
from memcache_jax.engine.types import OfBlocks, OfTokens, Selection
from memcache_jax.gating import finite_rows, in_order
from memcache_jax.kernels.bands import (
    Band,
    Fits,
    bands_of_matrix,
    bands_of_network,
    blind_where_gates_are_zero,
    gated,
    sum_of_bands,
)
from memcache_jax.kernels.bank_read import bank_read
from memcache_jax.kernels.chunk_update import chunk_update
from memcache_jax.kernels.grouped_read import grouped_read
from memcache_jax.memories import Memory

Divide: TypeAlias = Callable[[Matrices, Array, Fits], list[Band]]
"""From the matrices of states, the rows that read them and what fits, to the bands."""


@dataclasses.dataclass(frozen=True)
class Live:
    """The live memory after each token of blocks (b, h, n, c, ...).

    Attributes:
      memory: the rule.
      query: what reads it.
      kept: the parts that were kept of each chunk, (b, h, n, chunks, ...).
      implementation: of reads through its layers.
    """

    memory: Memory
    query: Float[Array, "b h n c k"]
    kept: dict[str, Any]
    implementation: str | None

    def reads(self) -> Float[Array, "b h n c v"]:
        """What each token reads with its query."""
        if "reads" in self.kept:
            return self._by_token(self.kept["reads"])
        return self.memory.forward(self.apply, self.query)

    def first_layer(self) -> Float[Array, "b h n c f"]:
        """The first layer's output for each token's query."""
        if "first_layer" in self.kept:
            return self._by_token(self.kept["first_layer"])
        return self.apply(0, self.query)

    def apply(self, layer: int, x: Float[Array, "b h n c in"]) -> Float[Array, "b h n c out"]:
        """A layer, as it is after each token, of rows x."""
        views = self.kept["views"][layer] if "views" in self.kept else None
        if views is None:
            raise ValueError(
                f"layer {layer} of the live memory was not kept: an aggregation's needs(memory) "
                "must name 'layers' to apply it"
            )
        chunks = jax.tree.leaves(views)[0].shape[3]
        _, y = chunk_update(
            lambda _, xs: ((), self.memory.apply(xs[0], layer, xs[1])),
            (),
            (views, x.reshape(*x.shape[:3], chunks, -1, x.shape[-1])),
            batch_dims=3,
            implementation=self.implementation,
        )
        return self._by_token(y)

    def _by_token(self, x: Float[Array, "b h n chunks m v"]) -> Float[Array, "b h n c v"]:
        if self.kept.get("spoilt") is not None:
            x = jnp.where(self.kept["spoilt"][..., None], jnp.nan, x)
        return x.reshape(*x.shape[:3], -1, x.shape[-1])


def keep(
    memory: Memory, needs: Collection[str], view: Any, query: Float[Array, "m k"]
) -> dict[str, Any]:
    """The parts of ``needs`` of the live memory in a chunk, from its view and its queries."""
    kept = {}
    if "reads" in needs:
        kept["reads"] = memory.read_online(view, query)
    if "later_layers" in needs:
        kept["first_layer"] = memory.apply(view, 0, memory.features(query))
    first = 0 if "layers" in needs else 1 if "later_layers" in needs else memory.depth
    if first < memory.depth:
        layers = range(memory.depth)
        kept["views"] = tuple(memory.keep_layer(view, i) if i >= first else None for i in layers)
    return kept


class Bank(abc.ABC):
    """The cached states that selections number, wherever they lie, and how tokens read them.

    Attributes:
      memory: the rule.
    """

    memory: Memory

    @abc.abstractmethod
    def read(
        self, query: Float[Array, "b h n c k"], selection: Selection
    ) -> Float[Array, "b h n c v"]:
        """The gated sum of what the selected states return for each token's query."""

    @abc.abstractmethod
    def read_layer(
        self, layer: int, x: Float[Array, "b h n c in"], selection: Selection
    ) -> Float[Array, "b h n c out"]:
        """The gated sum of rows x through one layer of the selected states."""


@dataclasses.dataclass(frozen=True)
class ArrayBank(Bank):
    """States in one array for each matrix.

    Attributes:
      memory: the rule.
      matrices: of all states, (b, h, states, in, out) each.
      implementation: of the reads.
    """

    memory: Memory
    matrices: Matrices
    implementation: str | None

    def read(
        self, query: Float[Array, "b h n c k"], selection: Selection
    ) -> Float[Array, "b h n c v"]:
        """In one weighted sum of rows where a read is the state itself."""
        memory = self.memory
        if not memory.reads_query and self.implementation is None:
            rows = self.matrices[0]
            if isinstance(selection, OfBlocks) and in_order(selection.states, rows.shape[2]):
                return _weighted_rows(selection.gates, rows[:, :, :, 0])
        return self._sum(bands_of(memory), self.matrices, query, selection)

    def read_layer(
        self, layer: int, x: Float[Array, "b h n c in"], selection: Selection
    ) -> Float[Array, "b h n c out"]:
        """By one matrix of each state."""
        divide = functools.partial(bands_of_matrix, _read_matrix)
        return self._sum(divide, (self.matrices[layer],), x, selection)

    def gather(
        self,
        read: Callable[..., Array],
        matrices: Matrices,
        x: Float[Array, "b h n c in"],
        selection: Selection,
    ) -> Float[Array, "b h n c out"]:
        """The gated sum of ``read(state, rows, gates)`` over the selected states.

        Args:
          read: reads one state.
          matrices: of this bank's states, or a part of each.
          x: the rows that read.
          selection: which states, and with which gates.
        """
        if isinstance(selection, OfTokens):
            return grouped_read(
                *(read, matrices, x, selection.gates, selection.states),
                implementation=self.implementation,
            )
        read = blind_where_gates_are_zero(read) if selection.unread else read
        states = selection.states
        if isinstance(states, np.ndarray):
            states = states[0]
        else:
            states = jnp.broadcast_to(states, (len(x), *states.shape[1:]))
        return bank_read(
            read, matrices, x, selection.gates, states, implementation=self.implementation
        )

    def _sum(
        self, divide: Divide, matrices: Matrices, x: Array, selection: Selection
    ) -> Float[Array, "b h n c out"]:
        """``gather``, in bands that add up if a whole state exceeds a kernel's memory."""

        def gather(read: Callable[..., Array], matrices: Matrices, x: Array) -> Array:
            return self.gather(read, matrices, x, selection)

        return sum_of_bands(divide, matrices, x, self.implementation, gather)


def bands_of(memory: Memory) -> Divide:
    """How the read of a memory's states divides into smaller reads that add up."""
    if memory.form == "scan":
        return lambda matrices, query, fits: [Band(memory.read, matrices, query)]
    divide = bands_of_matrix if memory.depth == 1 else bands_of_network
    return functools.partial(divide, memory.read)


def _read_matrix(
    matrices: Matrices, x: Float[Array, "rows in"], gate: Float[Array, "rows"] | None = None
) -> Float[Array, "rows out"]:
    """The read of a single matrix."""
    return jnp.matmul(gated(gate, x), matrices[0])


def _weighted_rows(
    gates: Float[Array, "b h n c r"], rows: Float[Array, "b h r v"]
) -> Float[Array, "b h n c v"]:
    """The gated sum of rows; NaN wherever a row that is not finite has a gate."""
    rows, broken = finite_rows(rows)
    broken = jnp.einsum("bhncr,bhr->bhnc", gates, broken.astype(gates.dtype)) > 0
    return jnp.where(broken[..., None], jnp.nan, jnp.einsum("bhncr,bhrv->bhncv", gates, rows))
