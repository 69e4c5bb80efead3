"""A router that searches a tree of pooled keys instead of comparing all of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._checks import check_integer, set_fields
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.engine.types import Candidates
from memcache_jax.gating import finite_rows, visible
from memcache_jax.kernels._largest import largest


@dataclasses.dataclass(frozen=True)
class Tree:
    """A router for ``SSC(router=...)``: a beam search in a tree whose nodes have mean keys.

    SSC by itself compares a token with the pooled keys of all N states (Eq. 16-17 of
    arXiv:2602.24281); the tree is not from the paper. Node j of level l covers the segments j B^l
    to (j + 1) B^l - 1, and its key p_lj, (k,) per head, is the mean of their pooled keys. A token
    sees the nodes whose segments have all ended: no output depends on a later token or on the
    sequence's length. From the top level down, the search scores candidate nodes by <u_t, p_lj>,
    where u_t is the token's connector and n segments have ended::

        candidates of level l = children of the ``beam`` best candidates of level l + 1,
                                and the nodes j >= B floor(n / B^(l+1)), which have no parent yet

    The nodes of level 0 are the states, of which the ``top_k`` best are selected. So a token is
    compared with about (beam + 1) B log_B N keys instead of N. Ties go to the older node. With
    beam >= N / B the selection is that of SSC without a router. With a smaller beam the search may
    miss a state that is unlike its neighbors in time: see ``docs/capacity.md``. Each packed
    document has its own tree. A stream keeps the keys of the nodes beside the pooled keys, about
    N / (B - 1) more.

    Attributes:
      branching: B, children of a node, 2 or more.
      beam: nodes per level whose children are compared, 1 or more.

    Raises:
      ValueError: for a branching below 2 or a beam below 1.

    Example:
      >>> import memcache_jax as mc
      >>> mc.SSC(top_k=4, router=mc.Tree(branching=16, beam=4)).router.compared(4096)
      174
    """

    branching: int = 16
    beam: int = 4

    def __post_init__(self) -> None:
        set_fields(
            self,
            branching=check_integer("branching", self.branching, 2),
            beam=check_integer("beam", self.beam),
        )

    def levels(self, states: int) -> int:
        """The level at which a search among so many states begins; a beam holds all above it."""
        level = 0
        while states // self.branching ** (level + 1) > self.beam:
            level += 1
        return level

    def compared(self, states: int) -> int:
        """The most keys that a token is compared with among so many states."""
        levels = self.levels(states)
        each = (self.beam + 1) * self.branching - 1
        return states // self.branching**levels + levels * each

    def offsets(self, states: int) -> list[int]:
        """Where the keys of each level begin among a stream's keys, and where the last ones end.

        After the keys of the states, one place is spare, for states that get no slot.
        """
        sizes = [states // self.branching**level for level in range(self.levels(states) + 1)]
        sizes[0] += len(sizes) > 1
        return [0, *np.cumsum(sizes).tolist()]

    def chosen(
        self, top_k: int, relevance: Float[Array, "*rows states"]
    ) -> Int[Array, "*rows top_k"]:
        """The selected states of each row, -1 for none; a row does not see states of -inf.

        This is the definition, given the relevance of all states: a node's is the mean of theirs.
        """
        states, levels = relevance.shape[-1], self.levels(relevance.shape[-1])

        def of_row(row: Float[Array, "states"]) -> Int[Array, "top_k"]:
            seen = row != -jnp.inf
            tables = self._every_mean(jnp.where(seen, row, 0)[:, None], levels)
            first, count = jnp.argmax(seen), seen.sum()

            def score(level: int, nodes: Int[Array, "m"]) -> Float[Array, "m"]:
                place = first + nodes * self.branching**level
                return tables[level][:, 0].at[place].get(mode="clip")

            return self._search(top_k, states, count, score)[0] + first

        rows = relevance.reshape(-1, states)
        found = jax.vmap(of_row)(rows)
        return jnp.where(found < states, found, -1).reshape(*relevance.shape[:-1], -1)

    def select(
        self,
        top_k: int,
        connector: Float[Array, "b h n c u"],
        candidates: Candidates,
        pooling: str,
    ) -> tuple[Float[Array, "b h n c k"], Float[Array, "b h n c"], Int[Array, "b h n c k"]]:
        """The relevance of the selected states, -inf for none; the live memory's; and the states.

        If a compared key is not finite, the selection is unknown and its relevance is NaN.
        """
        (batch, heads, n, c, _), states = connector.shape, candidates.states.shape[-1]
        keys, seen, xp = candidates.keys(pooling), candidates.states, np
        known = candidates.counts is None and candidates.same_document is None
        if known and isinstance(seen, np.ndarray):  # spares the compiler a table of all blocks
            seen = seen[:, :, None] >= 0
        else:
            seen, xp = visible(candidates), jnp
        first, count = (
            jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, n, c))
            for x in (xp.argmax(seen, axis=-1), xp.sum(seen, axis=-1))
        )
        shifted = candidates.same_document is not None
        take, offsets = candidates.nodes, self.offsets(states)
        if take is None:
            assert keys.states is not None
            take, offsets = self._nodes(keys.states, shifted)

        def of_block(xs: tuple) -> tuple[Array, Array]:
            connector, *per_token = xs  # (b, h, c, u), (b, c), (b, c)
            first, count = (jnp.broadcast_to(x[:, None], (batch, heads, c)) for x in per_token)

            def score(level: int, nodes: Int[Array, "b h c m"]) -> Float[Array, "b h c m"]:
                place = nodes
                if shifted:
                    place = first[..., None] + nodes * self.branching**level
                last = offsets[level + 1] - offsets[level] - 1
                place = offsets[level] + jnp.clip(place, 0, last)
                near = take(place.reshape(batch, heads, -1)).reshape(*place.shape, -1)
                return jnp.einsum("bhcu,bhcmu->bhcm", connector, near, precision="highest")

            found, unknown = self._search(top_k, states, count, score)
            return jnp.where(found < states, found + first[..., None], -1), unknown

        xs = (
            lax.stop_gradient(jnp.moveaxis(connector, 2, 0)),
            *(jnp.moveaxis(x, 1, 0) for x in (first, count)),
        )
        found, unknown = (jnp.moveaxis(x, 0, 2) for x in lax.map(of_block, xs))
        near = take(jnp.maximum(found, 0).reshape(batch, heads, -1))
        near, _ = finite_rows(near.reshape(*found.shape, -1))
        few = jnp.einsum("bhncu,bhncku->bhnck", connector, near, precision="highest")
        few = jnp.where(found >= 0, few, -jnp.inf)
        few = jnp.where(unknown[..., None], jnp.nan, few)
        return few, jnp.vecdot(connector, keys.live, precision="highest"), found

    def _search(
        self,
        top_k: int,
        states: int,
        count: Int[Array, "*rows"],
        score: Callable[[int, Int[Array, "*rows m"]], Float[Array, "*rows m"]],
    ) -> tuple[Int[Array, "*rows k"], Bool[Array, "*rows"]]:
        """Those selected of ``count`` states, ``states`` for none, and whether a score was NaN."""
        base, levels = self.branching, self.levels(states)
        none, ones = jnp.int32(states), [1] * count.ndim
        nodes = jnp.arange(states // base**levels, dtype=jnp.int32).reshape(*ones, -1)
        nodes = jnp.broadcast_to(nodes, (*count.shape, nodes.shape[-1]))
        unknown = jnp.zeros(count.shape, bool)
        for level in reversed(range(levels + 1)):
            seen = nodes < (count // base**level)[..., None]
            scores = lax.stop_gradient(score(level, nodes))
            unknown |= (seen & jnp.isnan(scores)).any(axis=-1)
            scores = jnp.where(seen & ~jnp.isnan(scores), scores, -jnp.inf)
            most = min(self.beam if level else top_k, nodes.shape[-1])
            scores, places = largest(scores, most)
            nodes = jnp.take_along_axis(nodes, places, axis=-1)
            nodes = jnp.where(scores > -jnp.inf, nodes, none)
            if level:
                # In order of age, so that of equals the older one is selected.
                children = jnp.sort(nodes, axis=-1)[..., None] * base
                children += jnp.arange(base, dtype=jnp.int32).reshape(*ones, 1, -1)
                alone = count[..., None] // base**level * base
                alone += jnp.arange(base - 1, dtype=jnp.int32).reshape(*ones, -1)
                children = children.reshape(*count.shape, -1)
                nodes = jnp.concatenate([children, alone.astype(jnp.int32)], axis=-1)
        return nodes, unknown

    def _nodes(
        self, keys: Float[Array, "b h states k"], shifted: bool
    ) -> tuple[Callable[[Array], Array], list[int]]:
        """A function that takes nodes' keys by place, and where the keys of each level begin.

        With ``shifted``, a node begins at every state: a document's tree begins with its first
        segment.
        """
        keys = jnp.where(jnp.isfinite(keys).all(axis=-1, keepdims=True), keys, jnp.nan)
        levels = self.levels(keys.shape[2])
        if shifted:
            tables = jax.vmap(jax.vmap(lambda keys: tuple(self._every_mean(keys, levels))))(keys)
        else:
            tables = [keys]
            for _ in range(levels):
                tables.append(self._means(tables[-1]))
        every = jnp.concatenate(tables, axis=2)
        offsets = [0, *np.cumsum([table.shape[2] for table in tables]).tolist()]

        def take(places: Int[Array, "b h m"]) -> Float[Array, "b h m k"]:
            return jnp.take_along_axis(every, places[..., None], axis=2)

        return take, offsets

    def _means(self, keys: Float[Array, "b h nodes k"]) -> Float[Array, "b h parents k"]:
        """The mean of each node's children."""
        parents = keys.shape[2] // self.branching
        children = keys[:, :, : parents * self.branching]
        return children.reshape(*keys.shape[:2], parents, self.branching, -1).mean(axis=3)

    def _every_mean(self, rows: Float[Array, "states k"], levels: int) -> list[Array]:
        """For each level, the means of the nodes that begin at each state and fit."""
        tables, size = [rows], 1
        for _ in range(levels):
            rows, count = tables[-1], len(tables[-1]) - (self.branching - 1) * size
            children = [rows[i * size : i * size + count] for i in range(self.branching)]
            tables.append(sum(children[1:], start=children[0]) / self.branching)
            size *= self.branching
        return tables

    def with_nodes(
        self, storage: Any, arrays: Array, states: int, place: Int[Array, "b 1"]
    ) -> Array:
        """A stream's keys, with those of the nodes that the state at ``place`` completes."""
        offsets, base, after = self.offsets(states), self.branching, place + 1
        heads = len(storage.state)
        for level in range(1, self.levels(states) + 1):
            ends = (place < states) & (after % base**level == 0)
            node = after // base**level - 1
            children = offsets[level - 1] + jnp.maximum(node, 0) * base + np.arange(base)[None]
            children = jnp.broadcast_to(children[:, None], (len(place), heads, base))
            mean = storage.take(arrays, children).mean(axis=2, keepdims=True)
            at = jnp.where(ends, offsets[level] + node, storage.num_slots)
            arrays = storage.put(arrays, mean, at)
        return arrays
