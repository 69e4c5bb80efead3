"""Memory caching over a mesh: rows, heads and parts of a sequence side by side.

Rows of a batch and heads are independent. Parts of a sequence nearly are: with independent starts
each part writes its own segments. Only the states at their ends and the pooled keys cross the mesh,
and the maps of segments where buckets span several, not the activations of tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memcache_jax._typing import Array, Exchange, Float, Implementation, Int, Start
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import GRM, Aggregation, Residual, Soup
from memcache_jax.engine.bank import compose_plan
from memcache_jax.engine.documents import count_documents
from memcache_jax.engine.one_pass import one_pass
from memcache_jax.engine.run import cut_for, full_controls, heads_first, run, wide_dtype, writing
from memcache_jax.engine.types import CachedStates, Tokens
from memcache_jax.gating import in_order
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Lengths, ReadPlan, Segmentation
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import check_not_mapped_over
from memcache_jax.sharding.parts import Part, last_before
from memcache_jax.sparse import SSC


def over_mesh(
    division: Division,
    tokens: Tokens,
    weights: dict[str, Array],
    document_ids: Int[Array, "b t"] | None,
    exchange: Exchange,
    given: CachedStates | None = None,
    *,
    memory: Memory,
    aggregation: Aggregation,
    segmentation: Segmentation,
    start: Start,
    implementation: Implementation | None,
    hands_on: bool = False,
) -> Any:
    """``one_pass`` with each device working on its own rows, heads and part of the sequence.

    Raises:
      ValueError: if time is divided and ``check_parts`` says that it cannot be, or layers share
        states.
    """
    how: dict[str, Any] = dict(
        memory=memory,
        segmentation=segmentation,
        start=start,
        implementation=implementation,
    )
    of_controls: Any = {name: memory.controls[name].axes for name in tokens.controls}
    row: Any = "b t h ."
    of_border = None if tokens.border is None else "b t h"
    letters = Tokens(row, row, row, row, of_controls, of_border), "h", "b t"
    parts, length = division.parts, tokens.key.shape[1]
    if given is not None or hands_on:
        if parts > 1:
            raise ValueError(
                "layers that share cached states need whole sequences on each device (seq = 1), "
                f"got {parts} parts"
            )
        of_states: Any = "b h", "b h", row if isinstance(aggregation, SSC) else None
        made = (row, CachedStates(*of_states)) if hands_on else row

        def shared(*args: Any) -> Any:
            check_not_mapped_over()
            return one_pass(*args, aggregation=aggregation, hands_on=hands_on, **how)

        arrays = tokens, weights, document_ids, given
        return division.run(shared, arrays, (*letters, "b h"), made)
    carried = parts > 1 and is_carried(memory, aggregation, segmentation, length)
    if carried:
        size = -(-length // parts)
        chunk = memory.gradient_chunk or min(size, memory.largest_chunk)
        size = -(-size // chunk) * chunk
        how |= dict(segmentation=_Live(size), start="checkpoint")
        segmentation, exchange = how["segmentation"], "gather"
    document, local = document_ids, functools.partial(one_pass, aggregation=aggregation, **how)
    if parts > 1:
        # Padding gives each part a segment.
        whole = parts * segmentation.size if carried else length
        check_parts(parts, whole, exchange=exchange, **how)
        # Counted over the whole sequence: an id may come again in another part.
        if document is not None:
            document = division.compute(count_documents, document, "b t")
        padding = -length % (parts * segmentation.size)
        pad = functools.partial(_padded, division, padding)
        tokens, document = jax.tree.map(pad, (letters[0], letters[2]), (tokens, document))
        local = functools.partial(
            _one_part, division, ring=exchange == "ring", aggregation=aggregation, **how
        )

    def own(*args: Any) -> Array:
        check_not_mapped_over()
        return local(*args)

    y = division.run(own, (tokens, weights, document), letters, row)
    return y if y.shape[1] == length else division.compute(lambda y: y[:, :length], y, row)


def is_carried(
    memory: Memory, aggregation: Aggregation, segmentation: Segmentation, length: int
) -> bool:
    """Whether the sequence is a single segment, whose state is carried across the devices.

    Each part is then a run, and the state before it is composed of the runs before. The live memory
    is all that is read: the library's own aggregations give it the weight 1, whatever its key.
    """
    softmax = type(aggregation) in (Residual, GRM, Soup, SSC)
    return memory.merges and softmax and segmentation.plan(length).num_blocks == 1


@dataclasses.dataclass(frozen=True)
class _Live(Segmentation):
    """Segments that read no states but the live one, which goes on through them."""

    size: int

    def plan(self, length: int) -> ReadPlan:
        blocks = np.arange(self._blocks(length))
        none = np.zeros((0, 2), int), np.zeros((len(blocks), 0), int)
        return ReadPlan(self.size, *none, blocks)


def _padded(division: Division, padding: int, letters: str, x: Array | None) -> Array | None:
    """Tokens (b, t, ...) and so many more; the ids of documents go on."""
    axes = letters.split()
    if x is None or not padding or "t" not in axes:
        return x
    widths = [(0, padding if axis == "t" else 0) for axis in axes]
    mode = "edge" if letters == "b t" else "constant"
    return division.compute(lambda x: jnp.pad(x, widths, mode=mode), x, letters)


def _one_part(
    division: Division,
    tokens: Tokens,
    weights: dict[str, Array],
    document: Int[Array, "b t"] | None,
    *,
    ring: bool,
    memory: Memory,
    aggregation: Aggregation,
    segmentation: Segmentation,
    start: Start,
    implementation: Implementation | None,
) -> Float[Array, "b t h v"]:
    """The outputs of one part of a sequence, whole segments, within a ``shard_map``."""
    value, here = tokens.value, tokens.key.shape[1]
    length = division.parts * here
    own, plan = segmentation.plan(here), segmentation.plan(length)
    own_document = None
    if document is not None:
        # A document that continues from the part before is this part's document 0.
        own_document = document - last_before(document[:, -1:], document[:, :1], division.time_axis)
        document = document.reshape(len(document), own.num_blocks, -1)
    full = full_controls(memory, tokens.controls, tokens.key, tokens.value)
    tokens = heads_first(**tokens._replace(controls=full)._asdict())
    weights = {name: weight.astype(wide_dtype(tokens)) for name, weight in weights.items()}
    blocks = cut_for(memory, tokens, own_document, own, length)
    layout = Part(division.time_axis, own, plan, start == "checkpoint", ring, document)
    writes = writing(memory, aggregation, tokens, weights, implementation)
    y, *_ = run(layout, writes, aggregation, blocks)
    return jnp.moveaxis(y.reshape(*y.shape[:2], -1, y.shape[-1]), 1, 2).astype(value.dtype)


def check_parts(
    parts: int,
    length: int,
    *,
    memory: Memory,
    segmentation: Segmentation,
    start: Start,
    implementation: Implementation | None,
    exchange: Exchange,
) -> None:
    """Raises ValueError unless a sequence can be divided into so many parts."""
    plan = segmentation.plan(length)
    merges, rule = memory.merges, type(memory).__name__
    spans, checkpoint = plan.spans_segments.any(), start == "checkpoint"
    wanted = (
        (
            plan.begins.all() and not isinstance(segmentation, (Lengths, Adaptive)),
            f"segments of one size, got {segmentation}",
        ),
        (
            plan.num_blocks >= parts,
            f"a segment for each of the {parts} devices, got {length} tokens in {segmentation}",
        ),
        (implementation != "reference", "the fast path, not the reference"),
        (
            merges or not checkpoint,
            f"independent starts for {rule}, whose runs do not compose: each segment "
            "would wait for the one before",
        ),
        (
            compose_plan(memory, plan) or checkpoint or not spans,
            f"a Constant segmentation for {rule}, or buckets that double in size and a rule whose "
            "runs compose",
        ),
        (
            exchange != "ring" or fits_ring(segmentation, length),
            f"a Constant segmentation for a ring, got {segmentation}",
        ),
    )
    if missing := [reason for holds, reason in wanted if not holds]:
        raise ValueError(f"a sequence over several devices (seq > 1) needs {'; '.join(missing)}")


def fits_ring(segmentation: Segmentation, length: int) -> bool:
    """Whether blocks read the states of all blocks before them, slot i that of block i."""
    plan = segmentation.plan(length)
    blocks = np.arange(len(plan.buckets))
    own = np.array_equal(plan.buckets, np.stack([blocks, blocks + 1], axis=1))
    return own and in_order(plan.reads, len(blocks))
