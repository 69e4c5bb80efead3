"""A whole sequence on one device."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Implementation, Int, Start
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import Aggregation
from memcache_jax.choice import choice_of
from memcache_jax.engine import reference, reference_borders
from memcache_jax.engine.borders import Borders, find_borders, relaxed, straight_through
from memcache_jax.engine.documents import count_documents
from memcache_jax.engine.exact import longest_segment
from memcache_jax.engine.measures import by_errors
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
from memcache_jax.engine.types import CachedStates, Tokens, Writing
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Segmentation
from memcache_jax.sparse import SSC


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

    With ``given``, tokens read these cached states instead of their own. With ``hands_on``, the
    cached states are returned too.
    """
    value, length = tokens.value, tokens.key.shape[1]
    plan = segmentation.plan(length)
    full = full_controls(memory, tokens.controls, tokens.key, tokens.value)
    tokens = heads_first(**tokens._replace(controls=full)._asdict())
    weights = {name: weight.astype(wide_dtype(tokens)) for name, weight in weights.items()}
    document = None if document_ids is None else count_documents(document_ids)
    longest = longest_segment(segmentation) if aggregation.exact else 0
    how = writing(memory, aggregation, tokens, weights, implementation)
    borders, learned = None, None
    if isinstance(segmentation, Adaptive):
        borders = find_all_borders(segmentation, tokens, weights, document, how, start)
        if segmentation.by == "scores":
            learned = relaxed(segmentation, borders, widened(tokens).border)
    if implementation == "reference":
        assert given is None
        assert not hands_on  # layers that do are refused
        rules: dict[str, Any] = dict(memory=memory, aggregation=aggregation, start=start)
        wide = widened(tokens), weights
        y = reference.memory_caching(*wide, document, borders, plan=plan, longest=longest, **rules)
        if learned is not None:
            plan, borders = learned
            fixed = lax.stop_gradient(wide)
            soft = reference.memory_caching(
                *fixed, document, borders, plan=plan, longest=0, **rules
            )
            y = straight_through(y, soft)
    else:
        carries = start == "checkpoint"
        if borders is not None and not carries:  # segments begin as documents do
            document = borders.of_tokens(length)
        blocks = cut_for(memory, tokens, document, plan, length)
        more = None if learned is None else OnePass(learned[0], carries, learned[1])
        layout = OnePass(plan, carries, borders, longest, more)
        y, _, selection, (bank, candidates) = run(layout, how, aggregation, blocks, given)
        y = y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :length]
        if hands_on:
            assert isinstance(bank, ArrayBank)
            pooled: Any = candidates.keys(aggregation.pooling).states
            y, chosen = jnp.moveaxis(y, 1, 2).astype(value.dtype), None
            if isinstance(aggregation, SSC):
                chosen = choice_of(selection, aggregation.top_k)
                chosen = chosen.reshape(*chosen.shape[:2], -1, chosen.shape[-1])[:, :, :length]
                chosen = jnp.moveaxis(chosen, 1, 2)
            return y, CachedStates(bank.matrices, pooled, chosen)
    return jnp.moveaxis(y, 1, 2).astype(value.dtype)


def find_all_borders(
    segmentation: Adaptive,
    tokens: Tokens,
    weights: dict[str, Array],
    document: Int[Array, "b t"] | None,
    how: Writing,
    start: Start,
) -> Borders:
    """The borders that the tokens (b, h, t, ...) decide: by keys, scores or errors."""
    errors, wide = None, lax.stop_gradient(widened(tokens))  # as streams have them
    if segmentation.by == "errors":
        weights, carries = lax.stop_gradient(weights), start == "checkpoint"
        if how.implementation == "reference":
            return reference_borders.by_errors(
                segmentation, wide, weights, document, how.memory, carries
            )
        length = wide.key.shape[2]
        blocks = cut_for(how.memory, wide, document, segmentation.plan(length), length)
        initial = lax.stop_gradient(how.initial(wide.key.shape[:2]))
        errors = by_errors(how, blocks, initial, blocks.document, carries)
    return find_borders(segmentation, wide.key, document, border=wide.border, errors=errors)
