"""The states that a router picks, for each token and head."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._checks import check_choice
from memcache_jax._reads import blind_where_gates_are_zero
from memcache_jax._typing import Array, Float, Int, Matrices
from memcache_jax.aggregation.grm import GRM
from memcache_jax.gating import finite_rows, pooled_keys, running_keys, softmax_gates
from memcache_jax.kernels.grouped_read import grouped_read
from memcache_jax.kernels.ssc_route import ssc_route
from memcache_jax.memories import Memory
from memcache_jax.segmentation import ReadPlan


@dataclasses.dataclass(frozen=True)
class SSC(GRM):
    """Sparse selective caching (Eq. 16-17 of arXiv:2602.24281): a router picks the states to read.

    GRM over the online memory and the ``top_k`` cached states of highest relevance, per token and
    head; of equally relevant ones the older. Reads cost the same however long the sequence is.

    Attributes:
      gate: as GRM's.
      pooling: as GRM's.
      top_k: cached states that a token reads.
      inner: ``"grm"`` for the gated sum of reads, ``"soup"`` for the mixture of parameters.

    Raises:
      ValueError: as GRM, for ``top_k`` below 1, or an unknown ``inner``.

    Example:
      >>> import memcache_jax as mc
      >>> mc.SSC(top_k=2).inner
      'grm'
    """

    top_k: int = 4
    inner: str = "grm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("inner", self.inner, ("grm", "soup"))
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")

    @property
    def mixes(self) -> bool:
        """Whether parameters are mixed rather than reads."""
        return self.inner == "soup"

    def merges_exactly(self, memory: Memory) -> bool:
        """False: which states are selected depends on how many there are."""
        return False

    def gates(
        self, cached: Float[Array, "... r"], online: Float[Array, "..."]
    ) -> tuple[Float[Array, "... r"], Float[Array, "..."]]:
        """Softmax over the selected states and the online one; zero for the others."""
        if self.top_k < cached.shape[-1]:
            _, chosen = lax.top_k(lax.stop_gradient(cached), self.top_k)
            selected = jnp.zeros(cached.shape, bool)
            selected = jnp.put_along_axis(selected, chosen, True, axis=-1, inplace=False)
            cached = jnp.where(selected, cached, -jnp.inf)
        return softmax_gates(cached, online)

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
        """Gates of each token's own states, where they are selected by content."""
        by_content = self.gate == "content" and document is None
        if not by_content or self._all_are_few(plan.reads):
            return super().weigh(connector, key, plan, document, reads)

        def of_head(connector: Array, key: Array) -> tuple[Array, Array]:
            running = running_keys(key, plan, self.pooling)
            online = jnp.vecdot(connector, running, precision="highest")
            return pooled_keys(key, plan, self.pooling), online

        pooled, online = jax.vmap(jax.vmap(of_head))(connector, key)
        pooled, broken = finite_rows(pooled)
        cached, live, states = ssc_route(
            connector, pooled, online, plan.reads, self.top_k, implementation=implementation
        )
        # Which to select is not known where a relevance is not.
        seen = (plan.reads >= 0)[None, None]
        broken = (broken[:, :, np.maximum(plan.reads, 0)] & seen).any(axis=-1)
        cached = jnp.where(broken[..., None, None], jnp.nan, cached)
        return (cached, live), states

    def selected(
        self, gates: Float[Array, "b h n c r"], reads: np.ndarray | Array
    ) -> tuple[Array, np.ndarray | Array]:
        """Those of the ``top_k`` states of each token, if it selects among more."""
        if reads.ndim == 5 or self._all_are_few(reads):
            return gates, reads
        # The others' gates are zero, so that these are the largest.
        chosen_gates, slots = lax.top_k(gates, self.top_k)
        blocks, width = reads.shape[-2:]
        readable = jnp.asarray(reads).reshape(-1, 1, blocks, 1, width)
        states = jnp.take_along_axis(readable, slots.reshape(*slots.shape[:3], 1, -1), axis=-1)
        return chosen_gates, jnp.where(chosen_gates != 0, states.reshape(slots.shape), -1)

    def read_cached(
        self,
        read: Callable[..., Array],
        bank: Matrices,
        query: Float[Array, "b h n c k"],
        gates: Float[Array, "b h n c r"],
        reads: np.ndarray | Array,
        implementation: str | None = None,
    ) -> Float[Array, "b h n c v"]:
        """The gated sum of the reads of the selected states alone."""
        gates, reads = self.selected(gates, reads)
        if reads.ndim < 5:
            if self.top_k < gates.shape[-1]:
                read = blind_where_gates_are_zero(read)
            return super().read_cached(read, bank, query, gates, reads, implementation)
        states = jnp.asarray(reads)
        return grouped_read(read, bank, query, gates, states, implementation=implementation)

    def _all_are_few(self, reads: np.ndarray | Array) -> bool:
        """Whether reading all that blocks may read is no more than the selected ones of tokens."""
        if self.top_k >= reads.shape[-1]:
            return True
        total = np.sum(reads >= 0) if isinstance(reads, np.ndarray) else np.inf
        return bool(total <= self.top_k * (reads.size // reads.shape[-1]))
