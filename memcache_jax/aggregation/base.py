"""What all aggregations share: gates over states, and the gated sum of reads or of layers."""

import abc
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._reads import (
    all_in_order,
    blind_where_gates_are_zero,
    read_matrix,
    weighted_rows,
)
from memcache_jax._typing import Array, Float, Int, Matrices
from memcache_jax.gating import relevance
from memcache_jax.kernels.bank_read import bank_read
from memcache_jax.kernels.chunk_update import chunk_update
from memcache_jax.memories import Memory
from memcache_jax.memories._pieces import pieces_of_matrix, sum_of_pieces
from memcache_jax.segmentation import ReadPlan


class Aggregation(abc.ABC):
    """Gates over the visible states, and what they weigh: reads, or the memories' parameters.

    For one head of one sequence, y_t = gamma_online M_t(q_t) + sum_i gamma_i M_i(q_t), or with
    ``mixes``, y_t = M*(q_t) where each matrix of M* is that sum of the states' matrices.

    Attributes:
      gate: what the gates are made from: ``"content"``, the connector against the states' pooled
        keys; ``"position"``, logits of each distance in segments, which then are what is passed as
        the connector, (b, t, h, distances), the online state's first; or ``"uniform"``.
      pooling: whether pooled keys are the ``"mean"`` or the ``"sum"`` of a bucket's keys.
    """

    gate: str = "uniform"
    pooling: str = "mean"

    @property
    def mixes(self) -> bool:
        """Whether parameters are mixed rather than reads."""
        return False

    @property
    def needs_connector(self) -> bool:
        """Whether gates are made from a connector."""
        return self.gate != "uniform"

    def merges_exactly(self, memory: Memory) -> bool:
        """Whether the mean of n states, counted n times, is as good as the n states."""
        return self.gate == "uniform" and (self.mixes or memory.depth == 1)

    @abc.abstractmethod
    def gates(
        self, cached: Float[Array, "... r"], online: Float[Array, "..."]
    ) -> tuple[Float[Array, "... r"], Float[Array, "..."]]:
        """Gates of the cached states and of the online one.

        Args:
          cached: relevance of each cached state, -inf where it is not visible.
          online: relevance of the online state.
        """

    def weigh(
        self,
        connector: Float[Array, "b h n c u"],
        key: Float[Array, "b h n c k"],
        plan: ReadPlan,
        document: Int[Array, "b n c"] | None,
        reads: np.ndarray | Array,
        *,
        implementation: str | None = None,
    ) -> tuple[tuple[Array, Array], np.ndarray | Array]:
        """The gates of all tokens, and the states that they are of.

        Args:
          connector: what gates are made from.
          key: the tokens' keys.
          plan: the buckets.
          document: the document of each token.
          reads: which states each block reads, as ``combine`` takes it.
          implementation: of the selection of states.

        Returns:
          Gates of the cached states and of the online one, and ``reads`` for ``combine``.
        """
        del implementation

        def score(connector: Array, key: Array, document: Array | None) -> tuple[Array, Array]:
            gate, pooling = self.gate, self.pooling
            return relevance(connector, key, plan, gate=gate, pooling=pooling, document=document)

        heads = jax.vmap(score, in_axes=(0, 0, None))
        rows_and_heads = jax.vmap(heads, in_axes=(0, 0, None if document is None else 0))
        return self.gates(*rows_and_heads(connector, key, document)), reads

    def selected(
        self, gates: Float[Array, "b h n c r"], reads: np.ndarray | Array
    ) -> tuple[Array, np.ndarray | Array]:
        """The gates and the states of what tokens read, where that is not all that blocks may."""
        return gates, reads

    def read_cached(
        self,
        read: Callable[..., Array],
        bank: Matrices,
        query: Float[Array, "b h n c k"],
        gates: Float[Array, "b h n c r"],
        reads: np.ndarray | Array,
        implementation: str | None = None,
    ) -> Float[Array, "b h n c v"]:
        """The gated sum of the reads of a bank of states."""
        return bank_read(read, bank, query, gates, reads, implementation=implementation)

    def live(self, memory: Memory, chunk: Any, query: Float[Array, "m k"]) -> Any:
        """What ``combine`` needs of the live memory in a chunk: its reads.

        Where layers are mixed, the reads of the first one, and the later ones themselves.
        """
        if not self._mixes_layers(memory):
            return memory.read_online(chunk, query)
        later = tuple(memory.keep_layer(chunk, layer) for layer in range(1, memory.depth))
        return memory.apply(chunk, 0, query), later

    def combine(
        self,
        memory: Memory,
        bank: Matrices,
        query: Float[Array, "b h n c k"],
        live: Any,
        gates: tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]],
        reads: np.ndarray | Array,
        *,
        zero_gates: bool = False,
        implementation: str | None = None,
        read_cached: Callable[..., Array] | None = None,
    ) -> Float[Array, "b h n c v"]:
        """The outputs of all tokens, from the live memory and a bank of states.

        A state that a token does not read reaches neither its output nor a gradient, NaN or not.

        Args:
          memory: the rule.
          bank: the cached states' matrices, (b, h, states, in, out) each.
          query: the queries, block by block.
          live: what ``live`` returned, (b, h, n, chunks, ...).
          gates: as from ``gates``.
          reads: which states each block reads, (n, r) or (b, n, r), -1 for none; or each token,
            (b, h, n, c, r).
          zero_gates: whether of the states that a block reads, those with a gate of zero are not
            read by that token, as with documents.
          implementation: of the reads of cached states.
          read_cached: what reads them, with the arguments of the method of that name, which is the
            default.
        """
        read_cached = read_cached or self.read_cached

        def read_piece(read: Callable[..., Array], bank: Matrices, x: Array) -> Array:
            read = blind_where_gates_are_zero(read) if zero_gates else read
            return read_cached(read, bank, x, gates[0], reads, implementation)

        def gated_sum(online: Array, divide: Callable, bank: Matrices, x: Array) -> Array:
            online = online.reshape(*x.shape[:-1], -1)
            if not memory.reads_query and implementation is None and all_in_order(reads, bank):
                cached = weighted_rows(gates[0], bank[0][:, :, :, 0])
            else:
                cached = sum_of_pieces(divide, bank, x, implementation, read_piece)
            return jnp.einsum("bhnc,bhncv->bhncv", gates[1], online) + cached

        if not self._mixes_layers(memory):
            return gated_sum(live, memory.pieces, bank, query)

        pieces_of_layer = functools.partial(pieces_of_matrix, read_matrix)

        def mixed(layer: int, x: Array) -> Array:
            """A layer of M*, never forming its weights: the gated sum of the layers' outputs."""
            online, later = live
            if layer > 0:
                _, online = chunk_update(
                    lambda _, xs: ((), memory.apply(xs[0], layer, xs[1])),
                    (),
                    (later[layer - 1], x.reshape(*online.shape[:-1], x.shape[-1])),
                    batch_dims=3,
                    implementation=implementation,
                )
            return gated_sum(online, pieces_of_layer, (bank[layer],), x)

        return memory.forward(mixed, query)

    def combine_token(
        self, memory: Memory, states: Matrices, query: Float[Array, "k"], gates: Float[Array, "s"]
    ) -> Float[Array, "v"]:
        """The equation itself: one token's output, from states stacked along their first axis.

        Those with a gate of zero are not read.
        """
        read = gates != 0
        states = jax.tree.map(lambda matrix: jnp.where(read[:, None, None], matrix, 0), states)
        if self.mixes:
            mixture = jax.tree.map(lambda matrix: jnp.tensordot(gates, matrix, axes=1), states)
            return memory.read(mixture, query[None])[0]
        reads = jax.vmap(memory.read, in_axes=(0, None))(states, query[None])[:, 0]
        return jnp.einsum("s,sv->v", gates, reads)

    def _mixes_layers(self, memory: Memory) -> bool:
        """Whether mixing parameters differs from mixing reads: not for a single layer."""
        return self.mixes and memory.depth > 1
