"""Documents packed into one sequence: which of them a token is of."""

import jax.numpy as jnp

from memcache_jax._typing import Array, Int


def count_documents(document_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Documents that have begun after the first: an id may come again, this does not."""
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def begun_in_chunk(document: Int[Array, "b n c"], chunk: int) -> Int[Array, "b n c"]:
    """Documents that have begun in a token's chunk, up to and with it."""
    chunks = document.reshape(document.shape[0], -1, chunk)
    before = jnp.pad(chunks[:, :-1, -1], ((0, 0), (1, 0)))
    return (chunks - before[..., None]).reshape(document.shape)
