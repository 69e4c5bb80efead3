"""A whole sequence on one device."""

import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Implementation, Int, Start
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import Aggregation
from memcache_jax.engine import reference
from memcache_jax.engine.borders import find_borders
from memcache_jax.engine.documents import count_documents
from memcache_jax.engine.exact import longest_segment
from memcache_jax.engine.run import (
    OnePass,
    cut_for,
    full_controls,
    heads_first,
    run,
    wide_dtype,
    widened,
    writing,
)
from memcache_jax.engine.types import Tokens
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Segmentation


def one_pass(
    tokens: Tokens,
    weights: dict[str, Array],
    document_ids: Int[Array, "b t"] | None,
    *,
    memory: Memory,
    aggregation: Aggregation,
    segmentation: Segmentation,
    start: Start,
    implementation: Implementation | None,
) -> Float[Array, "b t h v"]:
    """The outputs of tokens (b, t, h, ...), whose arguments have been checked."""
    value, length = tokens.value, tokens.key.shape[1]
    plan = segmentation.plan(length)
    full = full_controls(memory, tokens.controls, tokens.key, tokens.value)
    tokens = heads_first(**tokens._replace(controls=full)._asdict())
    weights = {name: weight.astype(wide_dtype(tokens)) for name, weight in weights.items()}
    document = None if document_ids is None else count_documents(document_ids)
    borders = None
    if isinstance(segmentation, Adaptive):
        keys = tokens.key.astype(wide_dtype(tokens))  # those of a stream
        borders = find_borders(segmentation, keys, document)
    longest = longest_segment(segmentation) if aggregation.exact else 0
    if implementation == "reference":
        y = reference.memory_caching(
            widened(tokens),
            weights,
            document,
            borders,
            memory=memory,
            aggregation=aggregation,
            plan=plan,
            start=start,
            longest=longest,
        )
    else:
        carries = start == "checkpoint"
        if borders is not None and not carries:  # segments begin as documents do
            document = borders.of_tokens(length)
        blocks = cut_for(memory, tokens, document, plan, length)
        how = writing(memory, aggregation, tokens, weights, implementation)
        y, _, _ = run(OnePass(plan, carries, borders, longest), how, aggregation, blocks)
        y = y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :length]
    return jnp.moveaxis(y, 1, 2).astype(value.dtype)
