"""One call: its tokens cut into blocks, then write, bank, select and read, over a layout."""

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Float, Int, Matrices, State
from memcache_jax._varying import vary, varying
from memcache_jax.aggregation import Aggregation
from memcache_jax.engine.bank import bucket_states, compose_plan, document_states
from memcache_jax.engine.borders import (
    Borders,
    adaptive_candidates,
    states_of,
    straight_through,
)
from memcache_jax.engine.documents import begun_in_chunk, document_candidates
from memcache_jax.engine.exact import exact_of_blocks
from memcache_jax.engine.finite import cleaned, narrow, reading_queries
from memcache_jax.engine.read import ArrayBank, Bank, Live
from memcache_jax.engine.spans import document_span_keys, span_keys
from memcache_jax.engine.types import (
    Blocks,
    CachedStates,
    Candidates,
    Keys,
    LivePart,
    Rows,
    Tokens,
    Views,
    Writing,
)
from memcache_jax.engine.write import initial_states, write_blocks
from memcache_jax.gating import in_order, pooled_keys, running_keys, running_scores
from memcache_jax.kernels._dispatch import CannotServeError
from memcache_jax.kernels.relevance import relevance
from memcache_jax.memories import Memory
from memcache_jax.memories.base import Run
from memcache_jax.segmentation import ReadPlan, exact_chunk


class Layout(abc.ABC):
    """Where the segments of a call are written, and where the states lie that its tokens read.

    Attributes:
      relaxed: a layout of the same segments, whose gradients outputs also get; or None.
    """

    relaxed: "Layout | None" = None

    @abc.abstractmethod
    def write(self, how: Writing, rows: Rows) -> tuple[Run, Views]:
        """Writes the blocks: the runs up to their ends, and what was kept of the live memory."""

    @abc.abstractmethod
    def cached(self, how: Writing, ends: Run, blocks: Blocks) -> tuple[Bank, Candidates]:
        """The cached states, and which of them the tokens of each block may read."""


def run(
    layout: Layout,
    how: Writing,
    aggregation: Aggregation,
    blocks: Blocks,
    given: CachedStates | None = None,
) -> tuple[Float[Array, "b h n c v"], Run, Any, tuple[Bank, Candidates]]:
    """Writes all blocks, banks states, selects among them and reads.

    With ``given``, it reads these states in place of its own, which have the same layout.

    Returns:
      The outputs, the runs up to the ends of the blocks, the aggregation's selection, and the bank
      and the candidates that it selected from.
    """
    ends, kept = layout.write(how, blocks.rows)
    y, selection, cached = _read(layout, how, aggregation, blocks, ends, kept, given)
    if layout.relaxed is not None:
        fixed = lax.stop_gradient((blocks, ends, kept))
        y = straight_through(y, _read(layout.relaxed, how, aggregation, *fixed)[0])
    return y, ends, selection, cached


def _read(
    layout: Layout,
    how: Writing,
    aggregation: Aggregation,
    blocks: Blocks,
    ends: Run,
    kept: Views,
    given: CachedStates | None = None,
) -> tuple[Float[Array, "b h n c v"], Any, tuple[Bank, Candidates]]:
    tokens = blocks.tokens
    bank, candidates = layout.cached(how, ends, blocks)
    if given is not None:
        bank = ArrayBank(how.memory, given.matrices, how.implementation)
        candidates = with_pooled(candidates, given.pooled)
    selection = aggregation.select(tokens.connector, candidates, implementation=how.implementation)
    live = Live(how.memory, tokens.query, kept, how.implementation)
    y = aggregation.read(bank, live, reading_queries(how, blocks), selection)
    beside = getattr(selection, "beside", None)  # a selection may be of a user's own type
    y = y if beside is None else y + beside.read
    return y, selection, (bank, candidates)


@dataclasses.dataclass(frozen=True)
class OnePass(Layout):
    """A whole sequence at once, on one device.

    Attributes:
      plan: its buckets and who reads them.
      carries: whether each segment continues from the one before.
      borders: where segments end if the tokens decide; None if the plan does.
      longest: the most tokens in a segment, if some are kept beside states; else 0.
      relaxed: as of ``Layout``.
    """

    plan: ReadPlan
    carries: bool
    borders: Borders | None = None
    longest: int = 0
    relaxed: Layout | None = None

    def write(self, how: Writing, rows: Rows) -> tuple[Run, Views]:
        """In sequence, or in parallel if every segment begins anew.

        Where tokens decide, segments begin within a sequence as documents do.
        """
        plan = self.plan
        if self.borders is not None:
            return write_blocks(how, rows, np.arange(plan.num_blocks) == 0)
        spans = bool(plan.spans_segments.any()) and not self.carries
        how = how.with_maps(spans and compose_plan(how.memory, plan))
        return write_blocks(how, rows, plan.begins & (not self.carries))

    def cached(self, how: Writing, ends: Run, blocks: Blocks) -> tuple[Bank, Candidates]:
        """The states at the ends of buckets, and the buckets that each block may read."""
        plan, document = self.plan, blocks.document
        if self.borders is not None:
            keys = blocks.tokens.key, blocks.pooled
            candidates = adaptive_candidates(plan, *keys, self.borders)
            matrices = how.memory.matrices(states_of(self.borders, ends.state))
            return self._with_exact(how, matrices, blocks, candidates)
        candidates = candidates_in(plan, blocks, how.implementation)
        if document is not None and plan.spans_segments.any():
            states, reads = document_states(
                how, ends, blocks.rows, plan, document, carries=self.carries
            )
            candidates = candidates._replace(states=reads)
        elif self.carries or not plan.spans_segments.any():
            last = plan.buckets[:, 1] - 1
            some = slice(len(last)) if np.array_equal(last, np.arange(len(last))) else last
            if how.implementation == "pallas_tpu" and isinstance(some, slice) and not self.longest:
                some = slice(None)  # kernels read states where they lie: to leave one out is a copy
            states = jax.tree.map(lambda x: x[:, :, some], ends.state)
        else:
            states = bucket_states(how, ends, blocks.rows, plan)
        return self._with_exact(how, how.memory.matrices(states), blocks, candidates)

    def _with_exact(
        self, how: Writing, matrices: Matrices, blocks: Blocks, candidates: Candidates
    ) -> tuple[Bank, Candidates]:
        """The bank, and the candidates with the tokens kept beside them."""
        bank = ArrayBank(how.memory, matrices, how.implementation)
        if not self.longest or not len(self.plan.buckets):
            return bank, candidates
        if self.borders is not None:
            last, owner = self.borders.last, self.borders.segment
            span = self.longest // self.plan.block_size
        else:
            owner, (first, after) = blocks.document, self.plan.buckets.T
            last, span = after[None] - 1, int(np.max(after - first))
            if span > 1:
                owner = np.cumsum(self.plan.begins)[None, :, None] + (0 if owner is None else owner)
                owner = jnp.broadcast_to(owner, (len(owner), *blocks.tokens.key.shape[2:4]))
        sizes = span, how.exact, self.longest
        exact = exact_of_blocks(how.memory, matrices, blocks, last, owner, *sizes)
        return bank, candidates._replace(exact=exact)


def writing(
    memory: Memory,
    aggregation: Aggregation,
    tokens: Tokens,
    weights: Mapping[str, Array],
    implementation: str | None,
) -> Writing:
    """How tokens are written, each segment from these initial weights or from zero."""

    def initial(shape: tuple[int, ...]) -> State:
        sizes = tokens.key.shape[-1], tokens.value.shape[-1]
        states = initial_states(memory, weights, shape, *sizes, wide_dtype(tokens))
        return vary(states, varying(tokens.key))

    needs = needs_of(aggregation, memory)
    return Writing(memory, needs, initial, implementation, exact=aggregation.exact)


def needs_of(aggregation: Aggregation, memory: Memory) -> tuple[LivePart, ...]:
    """The parts of the live memory that an aggregation reads, checked."""
    needs = aggregation.needs(memory)
    if isinstance(needs, str) or not set(needs) <= set(get_args(LivePart)):
        raise ValueError(
            f"{aggregation}.needs must return a tuple of {get_args(LivePart)}, got {needs!r}"
        )
    return tuple(needs)


def candidates_in(plan: ReadPlan, blocks: Blocks, implementation: str | None = None) -> Candidates:
    """The buckets that a plan's blocks may read, within each token's document if there are any."""
    keys, document = (blocks.tokens.key, blocks.pooled), blocks.document
    if document is None:
        candidates = candidates_of(plan, *keys, implementation)
        if implementation != "pallas_tpu" or blocks.came is None or not _of_segments(plan):
            return candidates

        def with_products(pooling: str) -> Keys:
            at_once = functools.partial(_products_at_once, blocks, pooling)
            return candidates.keys(pooling)._replace(at_once=at_once)

        return candidates._replace(keys=with_products)
    spans = functools.partial(document_span_keys, plan, *keys, document)
    return document_candidates(plan, *keys, document)._replace(spans=spans)


def _of_segments(plan: ReadPlan) -> bool:
    """Whether blocks are segments, and buckets are all of them but the last, in order."""
    count = plan.num_blocks - 1
    buckets = np.arange(count)[:, None] + np.arange(2)[None]
    return np.array_equal(plan.buckets, buckets) and in_order(plan.reads, count)


def _products_at_once(
    blocks: Blocks, pooling: str, connector: Float[Array, "b h n c u"]
) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]] | None:
    """``Keys.at_once`` by a kernel that reads connectors and keys in their own dtype."""
    came, wide = blocks.came, blocks.tokens
    if connector is not wide.connector:
        return None
    with contextlib.suppress(CannotServeError):
        rows = narrow(came.connector, wide.connector), narrow(came.key, wide.key)
        return relevance(*rows, pooling=pooling, implementation="pallas_tpu")
    return None


def with_pooled(candidates: Candidates, pooled: Float[Array, "b h states k"]) -> Candidates:
    """The candidates, with ``pooled`` in place of the states' own keys."""
    own = candidates.keys
    return candidates._replace(
        keys=lambda pooling: own(pooling)._replace(states=pooled, at_once=None)
    )


def candidates_of(
    plan: ReadPlan,
    key: Float[Array, "b h n c k"],
    pooled: Float[Array, "b h n c k"],
    implementation: str | None = None,
) -> Candidates:
    """The buckets that a plan's blocks may read, and their keys, running and ``pooled`` ones."""
    whole = bool(np.all(plan.first == np.arange(plan.num_blocks)))

    def keys(pooling: str) -> Keys:
        def of_head(key: Float[Array, "n c k"], pooled: Float[Array, "n c k"]) -> tuple:
            return running_keys(key, plan, pooling), pooled_keys(pooled, plan, pooling)

        # With kernels, running keys would cause most of the HBM traffic.
        fast = whole and implementation == "pallas_tpu"
        products = functools.partial(running_scores, plan, key, pooling) if fast else None
        return Keys(*jax.vmap(jax.vmap(of_head))(key, pooled), products=products)

    spans = functools.partial(span_keys, plan, plan, key, pooled)
    return Candidates(plan.reads[None], plan.distances[None], keys, spans=spans)


def widen(
    query: Array,
    key: Array,
    value: Array,
    connector: Array | None,
    controls: Mapping[str, Array],
    border: Array | None = None,
    dtype: DTypeLike | None = None,
) -> Tokens:
    """Tokens (b, h, t, ...), by default in float32 or wider, from arrays (b, t, h, ...)."""
    tokens = heads_first(query, key, value, connector, controls, border)
    return widened(tokens, dtype)


def heads_first(
    query: Array,
    key: Array,
    value: Array,
    connector: Array | None,
    controls: Mapping[str, Array],
    border: Array | None = None,
) -> Tokens:
    """Tokens (b, h, t, ...) in the dtypes of these arrays (b, t, h, ...)."""
    connector = jnp.zeros_like(query) if connector is None else connector
    tokens = Tokens(query, key, value, connector, dict(controls), border)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), tokens)


def wide_dtype(tokens: Tokens) -> Any:
    """The dtype that tokens are computed in: float32, or what they have if it is wider."""
    return jnp.promote_types(jnp.result_type(tokens.query, tokens.key, tokens.value), jnp.float32)


def widened(tokens: Tokens, dtype: DTypeLike | None = None) -> Tokens:
    """Tokens in this dtype, by default ``wide_dtype``."""
    return jax.tree.map(lambda x: x.astype(dtype or wide_dtype(tokens)), tokens)


def full_controls(
    memory: Memory, controls: Mapping[str, Array], key: Array, value: Array
) -> dict[str, Array]:
    """The controls of every token: constants of a head repeated, those left out zero."""
    rows, channels = key.shape[:3], {"k": key.shape[3:], "v": value.shape[3:]}
    full = {}
    for name, control in memory.controls.items():
        shape = rows + channels.get(control.axes[-1], ())
        if name not in controls:
            full[name] = jnp.zeros(shape, key.dtype)
        elif control.axes == "h":
            full[name] = jnp.broadcast_to(controls[name][None, None], shape)
        else:
            full[name] = controls[name]
    return full


def cut_for(
    memory: Memory,
    tokens: Tokens,
    document: Int[Array, "b t"] | None,
    plan: ReadPlan,
    length: int,
) -> Blocks:
    """Cuts a sequence of ``length`` tokens, or a part of one, into a plan's blocks and chunks."""
    block = plan.block_size
    chunk = memory.gradient_chunk or exact_chunk(block, length, memory.largest_chunk)
    if length <= block:  # nothing reads the state at its end
        block = -(-length // chunk) * chunk
    return cut(
        tokens, document, plan, block, chunk, came=memory.on_chip or memory.form == "descent"
    )


def cut(
    tokens: Tokens,
    document: Int[Array, "b t"] | None,
    plan: ReadPlan,
    block: int,
    chunk: int,
    came: bool = False,
) -> Blocks:
    """Cuts tokens (b, h, t, ...) into the plan's blocks, of ``block`` tokens, and chunks.

    With ``came``, also keeps the rows as they came.
    """
    dtype = wide_dtype(tokens)
    padding = plan.num_blocks * block - tokens.key.shape[2]

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, padding if axis == 2 else 0) for axis in range(x.ndim)])
        return x.reshape(*x.shape[:2], plan.num_blocks, block, *x.shape[3:])

    raw = jax.tree.map(split, tokens)
    tokens, bad = cleaned(raw)
    begun = None
    if document is not None:
        document = jnp.pad(document, ((0, 0), (0, padding)), mode="edge")
        document = document.reshape(-1, plan.num_blocks, block)
        begun = begun_in_chunk(document, chunk).astype(dtype)
        begun = jnp.broadcast_to(begun[:, None], tokens.key.shape[:4])

    def in_chunks(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(*x.shape[:3], -1, chunk, *x.shape[4:]), tree)

    def rows_of(tokens: Tokens) -> Rows:
        return Rows(*in_chunks((tokens.query, tokens.key, tokens.value, tokens.controls)))

    rows = rows_of(widened(tokens))._replace(begun=in_chunks(begun), bad=in_chunks(bad))
    rows = rows._replace(came=rows_of(raw) if came else None)
    pooled = raw.key.astype(dtype)
    return Blocks(widened(tokens), document, rows, pooled, raw if came else None)
