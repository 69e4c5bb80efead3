"""The functional core: a recurrent memory whose segment-end states stay readable."""

from collections.abc import Mapping
from typing import Any, get_args

from memcache_jax._checks import check_arguments, check_border, check_choice, check_mapping, shown
from memcache_jax._eager import compiled
from memcache_jax._typing import Array, Exchange, Float, Implementation, Int, Start
from memcache_jax._varying import alike
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import Aggregation
from memcache_jax.engine.exact import check_keeps
from memcache_jax.engine.one_pass import one_pass
from memcache_jax.engine.spans import check_num_keys
from memcache_jax.engine.types import CachedStates, Tokens
from memcache_jax.kernels._platform import check_platform
from memcache_jax.memories import Memory
from memcache_jax.segmentation import Constant, Segmentation
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.memory_caching import over_mesh


def memory_caching(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    connector: Float[Array, "b t h u"] | None = None,
    *,
    memory: Memory,
    controls: Mapping[str, Array] | None = None,
    border: Float[Array, "b t h"] | None = None,
    weights: Mapping[str, Array] | None = None,
    aggregation: Aggregation,
    segmentation: Segmentation,
    start: Start = "independent",
    document_ids: Int[Array, "b t"] | None = None,
    implementation: Implementation | None = None,
    exchange: Exchange = "gather",
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
        Decays are given as logs, <= 0: larger ones are refused in NumPy arrays, and elsewhere are
        growth. Constants of a head have shape (h,).
      border: logits by which segments of ``Adaptive(by="scores")`` end: a border comes after a
        block whose mean logit s, over tokens and heads, has sigmoid(s) above the threshold. Must be
        given for these segments, and for no others.
      weights: initial weights of a deep memory by name, one per head: (h, out, in).
      aggregation: how reads become one output: ``Residual()``, ``GRM()``, ``Soup()`` or ``SSC()``.
      segmentation: where states are cached: ``Constant(C)``, ``Logarithmic(C)``, ``Lengths`` or
        ``Adaptive(min, max)``.
      start: what a segment's memory begins with: ``"independent"``, the initial state, or
        ``"checkpoint"``, the state at the end of the segment before. Independent segments run side
        by side, so that the sequential part is C / chunk_size steps at any length.
      document_ids: for documents packed into one sequence, an id per token. Where it changes the
        memory begins anew, and what other documents cached is not read. Except with ``Lengths``, a
        document that begins on a block's border has the outputs that it has alone; any other has a
        shorter first segment and first chunk. Blocks are segments, or ``Adaptive``'s blocks.
      implementation: ``"xla"`` (the default), matrix products over chunks; ``"pallas_tpu"`` or
        ``"pallas_gpu"``, the same with the kernels for that device; or ``"reference"``, the
        recurrence token by token, slow and plain.
      exchange: on a mesh that divides time, how the parts get each other's states: ``"gather"``
        fetches all at once, ``"ring"`` one part's at a time, in less memory.

    On a mesh, rows, heads and time are worked on where they lie, and the output lies as the tokens
    do. Explicit axes are those of the arrays' types. Auto axes are those that the logical rules in
    context give to ``batch``, ``heads`` and ``time``, or, on a mesh of ``sharding.make_mesh``,
    ``data`` and ``fsdp``, ``tensor``, and ``seq``. Rows and heads that their devices do not divide
    evenly are not divided. Parts of a sequence write their own segments. Pooled keys are gathered,
    and so are the states at the ends of segments, or passed around. With checkpoint starts each
    part first writes its segments to know its last state, and then again from the state before it.

    Returns:
      The outputs y.

    Raises:
      ValueError: for shapes, controls or weights that do not fit each other or the memory, a
        missing connector, a missing or unexpected border, a segment size that the memory's chunk
        size does not divide, an unknown start, implementation or exchange, or document_ids with a
        segmentation that takes none.
        With time divided, also for fewer segments than devices, segments of several lengths, the
        reference, rules whose runs do not compose with checkpoint starts or ``Logarithmic``, and
        a ring unless blocks read the states of all segments before them.
      NotImplementedError: for kernels asked for by name that cannot serve, or that are not for the
        platform that the program is compiled for.

    Example:
      >>> import jax, memcache_jax as mc
      >>> q, k, v, u = jax.random.normal(jax.random.key(0), (4, 2, 100, 4, 16))
      >>> y = mc.memory_caching(q, k, v, u, memory=mc.memories.LinearAttention(),
      ...                       aggregation=mc.GRM(), segmentation=mc.Constant(32))
      >>> y.shape
      (2, 100, 4, 16)
    """
    return in_group(
        *(query, key, value, connector),
        memory=memory,
        controls=controls,
        border=border,
        weights=weights,
        aggregation=aggregation,
        segmentation=segmentation,
        start=start,
        document_ids=document_ids,
        implementation=implementation,
        exchange=exchange,
    )


def in_group(
    query: Array,
    key: Array,
    value: Array,
    connector: Array | None = None,
    given: CachedStates | None = None,
    *,
    memory: Memory,
    controls: Mapping[str, Array] | None = None,
    border: Float[Array, "b t h"] | None = None,
    weights: Mapping[str, Array] | None = None,
    aggregation: Aggregation,
    segmentation: Segmentation,
    start: Start = "independent",
    document_ids: Int[Array, "b t"] | None = None,
    implementation: Implementation | None = None,
    exchange: Exchange = "gather",
    hands_on: bool = False,
) -> Any:
    """``memory_caching`` of a layer that shares cached states with others.

    With ``given`` it reads these cached states instead of its own. With ``hands_on`` it returns the
    output and its cached states. Layers that share states have ``Constant`` segments of one size,
    ``exact=0`` and ``num_keys=1``.
    """
    controls, weights = check_mapping("controls", controls), check_mapping("weights", weights)
    check_configuration(memory, aggregation, segmentation, start, implementation)
    check_choice("exchange", exchange, get_args(Exchange))
    check_arguments(
        *(query, key, value, connector, memory, controls, weights),
        *(aggregation, segmentation, document_ids),
    )
    check_platform(implementation, query)
    some: Any = connector  # or None, which has no arrays to divide
    check_border(border, segmentation, key)
    tokens = Tokens(query, key, value, some, controls, border)
    how: dict[str, Any] = dict(
        memory=memory,
        aggregation=aggregation,
        segmentation=segmentation,
        start=start,
        implementation=implementation,
        hands_on=hands_on,
    )
    rows = (query, key, value, connector)
    division = Division.of(*((x, "b t h .") for x in rows), (document_ids, "b t"))
    tokens, initial, document_ids = alike((tokens, weights, document_ids))
    if division is None:
        return compiled(one_pass, tokens, initial, document_ids, given, **how)
    if isinstance(segmentation, Adaptive):  # all heads decide together where segments end
        division = division.whole("h")
    return over_mesh(division, tokens, initial, document_ids, exchange, given, **how)


def check_configuration(
    memory: Any,
    aggregation: Any,
    segmentation: Any,
    start: Any = "independent",
    implementation: Any = None,
) -> None:
    """Raises ValueError for what cannot be configured, whatever the arrays.

    The first three must be instances of their classes, the chunk size must divide the segment's,
    segments must have the tokens that are kept, and start and implementation must be known.
    """
    for what, got, wanted, example in (
        ("memory", memory, Memory, "mc.memories.Titans(chunk_size=64)"),
        ("aggregation", aggregation, Aggregation, "mc.GRM()"),
        ("segmentation", segmentation, Segmentation, "mc.Constant(256)"),
    ):
        if not isinstance(got, wanted):
            raise ValueError(f"{what} must be an object such as {example}, got {shown(got)}")
    check_num_keys(aggregation.num_keys, segmentation)
    if memory.gradient_chunk and segmentation.size % memory.gradient_chunk:
        raise ValueError(
            f"the chunk size of {type(memory).__name__}, {memory.gradient_chunk}, must divide the "
            f"segment size, got {segmentation}"
        )
    router = getattr(aggregation, "router", None)
    if router is not None and type(segmentation) is not Constant:
        raise ValueError(f"a router with {router} needs Constant segments, got {segmentation}")
    if aggregation.exact:
        check_keeps(aggregation.exact, segmentation)
    check_choice("start", start, get_args(Start))
    check_choice("implementation", implementation, (None, *get_args(Implementation)))
