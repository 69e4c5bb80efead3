"""Checks of the parts of a composed layer, each by itself and against the others."""

from typing import Any, get_args

from memcache_jax import _checks
from memcache_jax._typing import Exchange
from memcache_jax.caching import check_configuration
from memcache_jax.nn.recurrent.coefficients import Coefficient
from memcache_jax.nn.recurrent.decays import FixedDecay
from memcache_jax.nn.recurrent.declared import Declared
from memcache_jax.nn.recurrent.output import Output
from memcache_jax.nn.recurrent.path import Path


def check_parts(mixer: Any) -> None:
    """Raises ValueError for parts of a ``RecurrentMixer`` that no layer can have."""
    check_configuration(
        mixer.memory, mixer.aggregation, mixer.segmentation, mixer.start, mixer.implementation
    )
    for name in ("query", "key", "value"):
        _checks.check_instance(name, getattr(mixer, name), Path, "a Path")
    _checks.check_instance("output", mixer.output, Output, "an Output")
    _checks.check_instance("coefficients", mixer.coefficients, tuple, "a tuple of coefficients")
    for part in mixer.coefficients:
        if isinstance(part, type) or not isinstance(part, Coefficient):
            raise ValueError(f"coefficients must be such as Rate(), got {_checks.shown(part)}")
    _checks.check_fields(mixer, flags=("skip", "biases", "bonus", "shares_values", "matched"))
    if mixer.biases and any(path.rope_base for path in (mixer.query, mixer.key)):
        raise ValueError(
            "biases are added before queries and keys turn, but rotary positions come first: they "
            f"need rope_base=None, got {mixer.query}, {mixer.key}"
        )
    if mixer.query.first is not None or mixer.key.first is not None:
        raise ValueError("only values are shared between layers: query and key have no first")
    _checks.check_choice("exchange", mixer.exchange, get_args(Exchange))
    heads, sizes = mixer.value.heads, (mixer.query, mixer.key)
    if len({(path.heads, path.dim) for path in sizes}) > 1 or heads % mixer.key.heads:
        raise ValueError(
            "queries and keys must have the same heads and dim, and their heads must divide "
            f"those of the values, got {mixer.query}, {mixer.key}, {mixer.value}"
        )
    parts = mixer.coefficients
    made = [name for part in parts for name in part.names]
    learned = {name: c for name, c in mixer.memory.controls.items() if c.is_learned}
    # Constants of heads are the rule's own unless a part makes them.
    wanted = [name for name, c in learned.items() if not c.per_head or name in made]
    if sorted(made) != sorted(wanted):
        raise ValueError(f"{mixer.memory} needs the coefficients {wanted}, the parts make {made}")
    for part in parts:
        if isinstance(part, FixedDecay) and not learned[part.name].per_head:
            raise ValueError(f"{part.name} of {mixer.memory} is no constant of a head, got {part}")
        if isinstance(part, Declared) and part.memory != mixer.memory:
            raise ValueError(f"{part} must declare the layer's rule, {mixer.memory}")
    turning = [part for part in parts if getattr(part, "turns", False)]
    if len(turning) > 1:
        raise ValueError(f"one part may make turns, got {turning}")
    if mixer.matched and (turning or any(path.activation or path.rope_base for path in sizes)):
        raise ValueError(
            "matched=True is for queries and keys without activation, positions and turns, got "
            f"{mixer.query}, {mixer.key}, {turning}"
        )
    shapes = {(path.heads, path.conv_width) for path in sizes}
    if mixer.matched and shapes != {(heads, mixer.key.conv_width)}:
        raise ValueError(
            "matched=True needs queries and keys of the values' heads, convolved alike, got "
            f"{mixer.query}, {mixer.key}, {mixer.value}"
        )
    if mixer.memory.weight_shapes(mixer.key.dim, mixer.value.dim):
        raise ValueError(f"{mixer.memory} has initial weights: use mc.nn.MemoryCaching")
