"""Groups of layers that all read the cached states of their first layer."""

from collections.abc import Sequence
from typing import Any

from memcache_jax._checks import check_choice
from memcache_jax._typing import Array, Float, Int
from memcache_jax.aggregation import Aggregation
from memcache_jax.engine.types import CachedStates
from memcache_jax.nn.layer_cache import LayerCache
from memcache_jax.nn.parallel import side_by_side
from memcache_jax.segmentation import Constant, Segmentation
from memcache_jax.sparse import SSC
from memcache_jax.streaming import Cache


def check_states(
    states: Any,
    connector: Any,
    aggregation: Aggregation,
    segmentation: Segmentation,
    implementation: Any = None,
) -> None:
    """Raises ValueError for states, or a choice of them, that no layer can read."""
    check_choice("states", states, ("own", "previous"))
    follows = connector == "previous"
    if follows and (states == "own" or type(aggregation) is not SSC):
        raise ValueError(
            "connector='previous' is what SSC chose in the layer whose states are read: it needs "
            f"states='previous' and SSC, got states={states!r} and {aggregation}"
        )
    if states == "own":
        return
    constant = type(segmentation) is Constant
    if not constant or aggregation.exact or aggregation.num_keys > 1:
        raise ValueError(
            "states='previous' needs Constant segments, exact=0 and num_keys=1, got "
            f"{segmentation} and {aggregation}"
        )
    _check_implementation(implementation)


def leaders(mixers: Sequence[Any]) -> dict[int, int]:
    """For each mixer with ``states="previous"``, the number of the one whose states it reads.

    Raises:
      ValueError: if no mixer before it has its own states, or that one caches in another way.
    """
    found, last = {}, None
    for number, mixer in enumerate(mixers):
        for name, part in side_by_side(mixer).items():
            if name and getattr(part, "states", "own") != "own":
                raise ValueError(
                    f"{name} of {type(mixer).__name__} needs states='own', got states='previous'"
                )
        states = getattr(mixer, "states", None)
        if states == "own":
            last = number
        if states != "previous":
            continue
        if last is None:
            raise ValueError(
                "a mixer with states='previous' needs one with its own states before it, among "
                "the blocks that are repeated together; scan_layers=False makes them one sequence"
            )
        aggregation, memory = (getattr(mixer, name) for name in ("aggregation", "memory"))
        if aggregation.merges_exactly(memory):
            raise ValueError(
                "states='previous' needs gates that tell states apart: streams keep the sum of all "
                f"states for {aggregation}, got memory={memory}"
            )
        names = "memory", "aggregation", "segmentation", "start", "bounded"
        for name in names:
            own, other = getattr(mixers[last], name), getattr(mixer, name)
            if own != other:
                raise ValueError(
                    f"layers that share states need the same {name}, got {own}, {other}"
                )
        _check_implementation(getattr(mixers[last], "implementation", None))
        found[number] = last
    return found


def _check_implementation(implementation: Any) -> None:
    """Raises ValueError for one that keeps no states which another layer could read."""
    if implementation == "reference":
        raise ValueError(
            "layers that share cached states need another implementation than 'reference'"
        )


def call_in_group(
    layer: Any,
    x: Float[Array, "b t d"],
    document_ids: Int[Array, "b t"] | None,
    states: CachedStates | None,
) -> tuple[Float[Array, "b t d"], CachedStates | None]:
    """The output of a ``MemoryLayer`` of a group.

    It takes the cached states of the group's first layer unless it caches its own, and returns
    them.
    """
    if 0 in x.shape[:2]:
        return layer._mix(x, document_ids, None)[0], states
    share = dict(given=states) if layer.states == "previous" else dict(hands_on=True)
    y, _, made = layer._mix(x, document_ids, None, share)
    return y, states if made is None else made


def extend_in_group(
    layer: Any,
    x: Float[Array, "b t d"],
    cache: LayerCache,
    lengths: Any,
    source: tuple[Cache, Array | None] | None,
    hands_on: bool,
) -> tuple[Float[Array, "b t d"], LayerCache, Array | None]:
    """As ``MemoryLayer.extend``, of a layer of a group.

    Args:
      layer: the layer.
      x: as for ``extend``.
      cache: as for ``extend``.
      lengths: as for ``extend``.
      source: the cache of the group's first layer, after the same tokens, and what it chose for
        them; None for the first layer itself.
      hands_on: whether to return what this layer chose, for layers that follow it.
    """
    y, cache, _, chosen = layer._mix_next(x, cache, lengths, None, source, hands_on)
    return y, cache, chosen
