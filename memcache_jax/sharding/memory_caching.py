"""Memory caching over a mesh: rows, heads and parts of a sequence side by side.

Rows of a batch and heads are independent. Parts of a sequence nearly are: with independent starts
each part writes its own segments, and only the states at their ends and the pooled keys cross the
mesh, not the activations of tokens.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from memcache_jax._checks import check_arguments, check_choice
from memcache_jax._typing import Array, Float, Int
from memcache_jax.aggregation import Aggregation
from memcache_jax.caching import Implementation, Start, check_configuration, memory_caching
from memcache_jax.engine.documents import count_documents
from memcache_jax.engine.run import cut_for, full_controls, run, widen, writing
from memcache_jax.engine.types import Tokens
from memcache_jax.gating import in_order
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Lengths, Segmentation
from memcache_jax.sharding.mesh import active_mesh, num_devices, spec
from memcache_jax.sharding.parts import Part

Exchange: TypeAlias = Literal["gather", "ring"]


def memory_caching_over_mesh(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    connector: Float[Array, "b t h u"] | None = None,
    *,
    memory: Memory,
    controls: Mapping[str, Array] | None = None,
    weights: Mapping[str, Array] | None = None,
    aggregation: Aggregation,
    segmentation: Segmentation,
    start: Start = "independent",
    document_ids: Int[Array, "b t"] | None = None,
    implementation: Implementation | None = None,
    exchange: Exchange = "gather",
) -> Float[Array, "b t h v"]:
    """``memory_caching`` under the mesh of ``jax.set_mesh``, or on one device without a mesh.

    Rows are divided over ``data`` and ``fsdp``, heads over ``tensor``, and time over ``seq``: each
    part writes its own segments. Pooled keys are gathered, and with ``exchange="gather"`` so are
    the states at the ends of segments. With ``"ring"`` the states pass from part to part, and no
    device holds those of more than two other parts. With checkpoint starts each part first writes
    its segments to know its last state, and then again from the state before it; this takes rules
    whose states can be merged.

    Raises:
      ValueError: as ``memory_caching``; for an unknown exchange; for rows or heads that the mesh
        does not divide evenly; and, with time divided, for fewer segments than devices, segments of
        several lengths, the reference, packed documents or rules whose states cannot be merged with
        checkpoint starts or ``Logarithmic``, and a ring unless blocks read the states of all
        segments before them.
    """
    where: dict[str, Any] = dict(
        memory=memory, segmentation=segmentation, start=start, implementation=implementation
    )
    how: dict[str, Any] = where | dict(aggregation=aggregation)
    check_choice("exchange", exchange, get_args(Exchange))
    mesh = active_mesh()
    controls, weights = dict(controls or {}), dict(weights or {})
    if mesh is None:
        options = dict(controls=controls, weights=weights, document_ids=document_ids)
        return memory_caching(query, key, value, connector, **options, **how)
    check_configuration(memory, aggregation, segmentation, start, implementation)
    check_arguments(
        *(query, key, value, connector, memory, controls, weights),
        *(aggregation, segmentation, document_ids),
    )
    for name, axis in (("batch", 0), ("heads", 2)):
        if key.shape[axis] % num_devices(mesh, name):
            raise ValueError(
                f"the mesh divides {name} over {num_devices(mesh, name)} devices, "
                f"got {key.shape[axis]}"
            )
    parts, length = num_devices(mesh, "time"), key.shape[1]
    some: Any = connector  # or None, which has no arrays to divide
    tokens, document = Tokens(query, key, value, some, controls), document_ids
    if parts > 1:
        check_parts(parts, length, exchange=exchange, documents=document_ids is not None, **where)
        padding = -length % (parts * segmentation.size)

        def pad(x: Array) -> Array:
            return jnp.pad(x, [(0, padding if axis == 1 else 0) for axis in range(x.ndim)])

        tokens = jax.tree.map(pad, tokens)
        if document_ids is not None:
            # Counted over the whole sequence: an id may come again in another part.
            document = count_documents(document_ids)
            document = jnp.pad(document, ((0, 0), (0, padding)), mode="edge")

    def local(tokens: Tokens, weights: dict, document: Array | None) -> Array:
        if parts == 1:
            options = tokens._asdict() | dict(weights=weights, document_ids=document)
            return memory_caching(**options, **how)
        here = tokens.key.shape[1]
        own, plan = segmentation.plan(here), segmentation.plan(parts * here)
        own_document = None
        if document is not None:
            # A document that continues from the part before is this part's document 0.
            own_document = document - document[:, :1]
            document = document.reshape(len(document), own.num_blocks, -1)
        full = full_controls(memory, tokens.controls, tokens.key)
        widened = widen(**tokens._replace(controls=full)._asdict())
        weights = {name: weight.astype(widened.key.dtype) for name, weight in weights.items()}
        blocks = cut_for(memory, widened, own_document, own, parts * here)
        layout = Part(own, plan, start == "checkpoint", exchange == "ring", document)
        writes = writing(memory, aggregation, widened, weights, implementation)
        y, _, _ = run(layout, writes, aggregation, blocks)
        return jnp.moveaxis(y.reshape(*y.shape[:2], -1, y.shape[-1]), 1, 2).astype(value.dtype)

    row: Any = spec("batch", "time", "heads")
    heads = spec("heads")
    of_controls: Any = {
        name: heads if memory.controls[name].axes == "h" else row for name in controls
    }
    y = jax.shard_map(
        local,
        in_specs=(Tokens(row, row, row, row, of_controls), heads, PartitionSpec(*row[:2])),
        out_specs=row,
        check_vma=False,
    )(tokens, weights, document)
    return y[:, :length]


def check_parts(
    parts: int,
    length: int,
    *,
    memory: Memory,
    segmentation: Segmentation,
    start: Start,
    implementation: Implementation | None,
    exchange: Exchange,
    documents: bool = False,
) -> None:
    """Raises ValueError unless a sequence can be divided into so many parts."""
    plan = segmentation.plan(length)
    merges, rule = memory.merges, type(memory).__name__
    spans, checkpoint = plan.spans_segments.any(), start == "checkpoint"
    wanted = (
        (
            plan.begins.all() and not isinstance(segmentation, Lengths),
            f"segments of one size, got {segmentation}",
        ),
        (
            plan.num_blocks >= parts,
            f"a segment for each of the {parts} devices, got {length} tokens in {segmentation}",
        ),
        (not (documents and checkpoint), "independent starts for document_ids"),
        (
            not (documents and spans),
            "a Constant segmentation for document_ids: other buckets count from where a document "
            "begins",
        ),
        (implementation != "reference", "the fast path, not the reference"),
        (
            not checkpoint or implementation in (None, "xla"),
            "independent starts for kernels",
        ),
        (
            merges or not checkpoint,
            f"independent starts for {rule}, whose states cannot be merged: each segment would "
            "wait for the one before",
        ),
        (
            merges or checkpoint or not spans,
            f"a Constant segmentation for {rule}, whose states cannot be merged",
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
