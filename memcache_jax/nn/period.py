"""What ``scan_stack`` runs for a period of a model's blocks: in a call, for gates, in a stream."""

import jax
from flax import nnx

from memcache_jax._typing import Array, Int
from memcache_jax.nn.block import Between, Hidden, Period, stream_of
from memcache_jax.nn.memory_layer import MemoryLayer


def call(
    period: Period, x: Between, _: None, document_ids: Int[Array, "b t"] | None
) -> tuple[Between, None]:
    """What a period makes of its input."""
    return period(x, document_ids), None


def gates(period: Period, x: Between, *_: None) -> tuple[Between, list]:
    """The same, with the gates of each block."""
    found = []
    for block in period.blocks:
        given = block.mixer_input(stream_of(x))
        first = x.values if isinstance(x, Hidden) else None
        of_layers = {
            ".".join(map(str, path)): layer.gates(given, first=first)
            for path, layer in nnx.iter_modules(block.mixer)
            if isinstance(layer, MemoryLayer)
        }
        one = next(iter(of_layers.values()), None)
        found.append(of_layers if len(of_layers) > 1 else one)
        x = block(x)
    return x, found


def extend(
    period: Period, carry: tuple, layer: tuple, lengths: Int[Array, "b"] | None
) -> tuple[tuple, list]:
    """The same of a stream, with the caches of its blocks."""
    (x, states), (small, number) = carry, layer
    caches = [
        cache.with_states(shared, number) for cache, shared in zip(small, states, strict=True)
    ]
    x, caches = period.extend(x, caches, lengths)
    return (x, [cache.states for cache in caches]), without_states(caches)


def without_states(caches: list) -> list:
    """The layers' caches without their shared arrays, which a scan would copy."""
    return [cache.with_states(jax.tree.map(lambda _: None, cache.states)) for cache in caches]
