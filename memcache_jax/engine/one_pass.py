"""A whole sequence on one device."""

from typing import Any

import jax.numpy as jnp

from memcache_jax._typing import Array, Implementation, Int, Start
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import Aggregation
from memcache_jax.engine import reference
from memcache_jax.engine.borders import find_borders
from memcache_jax.engine.documents import count_documents
from memcache_jax.engine.exact import longest_segment
from memcache_jax.engine.read import ArrayBank
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
from memcache_jax.engine.types import CachedStates, Tokens
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Segmentation


def one_pass(
    tokens: Tokens,
    weights: dict[str, Array],
    document_ids: Int[Array, "b t"] | None,
    given: CachedStates | None = None,
    *,
    memory: Memory,
    aggregation: Aggregation,
    segmentation: Segmentation,
    start: Start,
    implementation: Implementation | None,
    hands_on: bool = False,
) -> Any:
    """The outputs of tokens (b, t, h, ...), whose arguments have been checked.

    With ``given``, tokens read these cached states, and not their own. With ``hands_on``, the
    states that were read are returned too.
    """
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
        if given is not None or hands_on:
            raise ValueError("layers that share cached states have no implementation='reference'")
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
        layout = OnePass(plan, carries, borders, longest)
        y, _, _, (bank, candidates) = run(layout, how, aggregation, blocks, given)
        y = y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :length]
        if hands_on:
            assert isinstance(bank, ArrayBank)
            pooled: Any = candidates.keys(aggregation.pooling).states
            y = jnp.moveaxis(y, 1, 2).astype(value.dtype)
            return y, CachedStates(bank.matrices, pooled)
    return jnp.moveaxis(y, 1, 2).astype(value.dtype)
