"""The functional core: a recurrent memory whose segment-end states stay readable."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from memcache_jax import _checks, _reference
from memcache_jax._arguments import check_arguments
from memcache_jax._bank import bucket_states
from memcache_jax._documents import begun_in_chunk, count_documents
from memcache_jax._typing import Array, Float, Int, State
from memcache_jax._writing import initial_states, write_blocks
from memcache_jax.aggregation import Aggregation
from memcache_jax.memories import Memory
from memcache_jax.segmentation import ReadPlan, Segmentation

Start: TypeAlias = Literal["independent", "checkpoint"]
Implementation: TypeAlias = Literal["xla", "pallas_tpu", "pallas_gpu", "reference"]


def memory_caching(
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
) -> Float[Array, "b t h v"]:
    """Memory Caching (Eq. 4-10 of arXiv:2602.24281): a recurrent memory with cached past states.

    Every token is written to the live memory, M_t = f(M_{t-1}; k_t, v_t, controls_t), and then
    reads it together with the states that the memory had at the ends of earlier segments::

        y_t = Agg(M_1, ..., M_{s-1}; M_t; q_t)

    The output at t depends on no later token and not on the sequence's length. States, gates and
    sums are kept in float32 (float64 for float64 inputs); the output has ``value``'s dtype. It is
    differentiable in reverse mode (``jax.grad``, ``jax.vjp``).

    Args:
      query: q, what a token reads with.
      key: k, where a token writes.
      value: v, what a token writes.
      connector: u, what a token's gates compare with the pooled keys of each state. For gates by
        position, the logits of each distance in segments, (b, t, h, distances), the live memory's
        first. Not needed by ``Residual`` and uniform gates.
      memory: the write rule, such as ``memories.Titans(chunk_size=64)``.
      controls: the rule's per-token coefficients by name, shapes as ``memory.controls`` says.
        Decays are given as logs, <= 0. Constants of a head have shape (h,).
      weights: initial weights of a deep memory by name, one per head: (h, out, in).
      aggregation: how reads become one output: ``Residual()``, ``GRM()``, ``Soup()`` or ``SSC()``.
      segmentation: where states are cached: ``Constant(C)``, ``Logarithmic(C)`` or ``Lengths``.
      start: what a segment's memory begins with: ``"independent"``, the initial state, or
        ``"checkpoint"``, the state at the end of the segment before. Independent segments run side
        by side, so that the sequential part is C / chunk_size steps at any length.
      document_ids: for documents packed into one sequence, an id per token. Where it changes the
        memory begins anew, and what other documents cached is not read. With ``Constant`` and
        ``Logarithmic``, a document that begins on a segment's border has the outputs that it has
        alone; any other has a shorter first segment and first chunk.
      implementation: ``"xla"`` (the default), matrix products over chunks; ``"pallas_tpu"`` or
        ``"pallas_gpu"``, the same with the kernels for that device; or ``"reference"``, the
        recurrence token by token, slow and plain.

    Returns:
      The outputs y.

    Raises:
      ValueError: for shapes, controls or weights that do not fit each other or the memory, a
        missing connector, a segment size that the memory's chunk size does not divide, an unknown
        start or implementation, or document_ids with a segmentation or a memory that takes none.
      NotImplementedError: for kernels asked for by name that cannot serve.

    Example:
      >>> import jax, memcache_jax as mc
      >>> q, k, v, u = jax.random.normal(jax.random.key(0), (4, 2, 100, 4, 16))
      >>> y = mc.memory_caching(q, k, v, u, memory=mc.memories.LinearAttention(),
      ...                       aggregation=mc.GRM(), segmentation=mc.Constant(32))
      >>> y.shape
      (2, 100, 4, 16)
    """
    controls = dict(controls or {})
    weights = dict(weights or {})
    check_arguments(
        query,
        key,
        value,
        connector,
        memory,
        controls,
        weights,
        aggregation,
        segmentation,
        document_ids,
    )
    _checks.check_choice("start", start, ("independent", "checkpoint"))
    check_implementation(implementation)

    tokens, initial = widened(memory, query, key, value, connector, controls, weights)
    document = None if document_ids is None else count_documents(document_ids)
    if implementation == "reference":
        run = _reference.memory_caching
    else:
        run = functools.partial(_chunked, implementation=implementation)
    y = run(
        tokens,
        initial,
        document,
        memory=memory,
        aggregation=aggregation,
        plan=segmentation.plan(query.shape[1]),
        start=start,
    )
    return jnp.moveaxis(y, 1, 2).astype(value.dtype)


def check_implementation(implementation: Any) -> None:
    """Raises ValueError unless it is None or one of ``Implementation``."""
    _checks.check_choice("implementation", implementation, (None, *get_args(Implementation)))


def widened(
    memory: Memory,
    query: Array,
    key: Array,
    value: Array,
    connector: Array | None,
    controls: Mapping[str, Array],
    weights: Mapping[str, Array],
) -> tuple[tuple, dict[str, Array]]:
    """Tokens (b, h, t, ...) with all their controls, and weights, in float32 or wider."""
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    if connector is None:
        connector = jnp.zeros_like(query)
    tokens = (query, key, value, connector, full_controls(memory, controls, key))
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x.astype(dtype), 2, 1), tokens)
    return tokens, {name: weight.astype(dtype) for name, weight in weights.items()}


def full_controls(memory: Memory, controls: Mapping[str, Array], key: Array) -> dict[str, Array]:
    """The controls of every token: constants of a head repeated, those left out zero."""
    rows, channels = key.shape[:3], key.shape[3:]
    full = {}
    for name, control in memory.controls.items():
        shape = rows + channels * control.axes.endswith("k")
        if name not in controls:
            full[name] = jnp.zeros(shape, key.dtype)
        elif control.axes == "h":
            full[name] = jnp.broadcast_to(controls[name][None, None], shape)
        else:
            full[name] = controls[name]
    return full


def _chunked(
    tokens: tuple,
    weights: Mapping[str, Array],
    document: Int[Array, "b t"] | None,
    *,
    memory: Memory,
    aggregation: Aggregation,
    plan: ReadPlan,
    start: Start,
    implementation: Implementation | None,
) -> Float[Array, "b h t v"]:
    """The fast path: write all segments chunk by chunk, then read live and cached states."""
    length = tokens[0].shape[2]
    (query, key, value, connector, _), document, rows = split_blocks(
        memory, tokens, document, plan, length
    )

    def initial(shape: tuple[int, ...]) -> State:
        return initial_states(memory, weights, shape, key.shape[-1], value.shape[-1], key.dtype)

    how: dict[str, Any] = dict(carries=start == "checkpoint", implementation=implementation)
    live = functools.partial(aggregation.live, memory)
    ends, kept = write_blocks(memory, live, initial, rows, plan, **how)
    bank, reads = bucket_states(memory, ends, initial, rows, plan, document, **how)

    gates, reads = aggregation.weigh(
        connector, key, plan, document, reads, implementation=implementation
    )
    y = aggregation.combine(
        memory,
        memory.matrices(bank),
        query,
        kept,
        gates,
        reads,
        zero_gates=document is not None,
        implementation=implementation,
    )
    return y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :length]


def split_blocks(
    memory: Memory,
    tokens: tuple,
    document: Int[Array, "b t"] | None,
    plan: ReadPlan,
    length: int,
) -> tuple[tuple, Int[Array, "b n c"] | None, tuple]:
    """Cuts tokens (b, h, t, ...), or a part of a sequence of ``length``, into a plan's blocks.

    Returns:
      The tokens (b, h, n, c, ...), zeros at the end that no real token sees, their documents, and
      the rows (b, h, n, chunks, m, ...) that ``write_blocks`` takes.
    """
    block = plan.block_size
    chunk = memory.gradient_chunk or exact_chunk(block, length, memory.largest_chunk)
    if length <= block:  # nothing reads the state at its end
        block = -(-length // chunk) * chunk
    padding = plan.num_blocks * block - tokens[0].shape[2]

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, padding if axis == 2 else 0) for axis in range(x.ndim)])
        return x.reshape(*x.shape[:2], plan.num_blocks, block, *x.shape[3:])

    tokens = jax.tree.map(split, tokens)
    query, key, value, _, controls = tokens
    begun = None
    if document is not None:
        document = jnp.pad(document, ((0, 0), (0, padding)), mode="edge")
        document = document.reshape(-1, plan.num_blocks, block)
        begun = begun_in_chunk(document, chunk).astype(key.dtype)
        begun = jnp.broadcast_to(begun[:, None], key.shape[:4])
    rows = jax.tree.map(
        lambda x: x.reshape(*x.shape[:3], -1, chunk, *x.shape[4:]),
        (query, key, value, controls, begun),
    )
    return tokens, document, rows


def exact_chunk(block: int, length: int, most: int) -> int:
    """A chunk length for rules that are exact for any: up to ``most``, and a divisor of the block.

    A block with no divisor of a useful size is one chunk. A sequence of one block is filled up.
    """
    if length <= block:
        return min(length, most)
    best = max(size for size in range(1, min(block, most) + 1) if block % size == 0)
    return best if best * 4 >= min(block, most) else block
