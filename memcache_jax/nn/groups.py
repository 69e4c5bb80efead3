"""Groups of layers that all read the cached states of their first layer."""

from collections.abc import Sequence
from typing import Any

from memcache_jax._checks import check_choice
from memcache_jax.aggregation import Aggregation
from memcache_jax.nn.parallel import side_by_side
from memcache_jax.segmentation import Constant, Segmentation


def check_states(states: Any, aggregation: Aggregation, segmentation: Segmentation) -> None:
    """Raises ValueError for states that no layer can read."""
    check_choice("states", states, ("own", "previous"))
    if states == "own":
        return
    constant = type(segmentation) is Constant
    if not constant or aggregation.exact or aggregation.num_keys > 1:
        raise ValueError(
            "states='previous' needs Constant segments, exact=0 and num_keys=1, got "
            f"{segmentation} and {aggregation}"
        )


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
        found[number] = last
    return found
