"""Array types, and the one legend of axis letters used in annotations and in einsum alike.

b  batch                    k  key dimension of a head
t  time (tokens)            v  value dimension of a head
h  heads                    f  hidden width of a deep memory
n  blocks of segment size   d  model dimension
c  tokens in a segment      r  cached states that a block may read
m  tokens in a chunk
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from jax import Array
from jaxtyping import Bool, Float, Int

Matrices: TypeAlias = tuple[Array, ...]
"""The parameters that a memory reads through, one matrix (in, out) per layer.

Rows times a matrix is the product that every backend runs without a transposed copy.
"""

Apply: TypeAlias = Callable[[int, Array], Array]
"""``apply(layer, x)``: rows ``x`` (rows, in) through one layer of a memory, to (rows, out)."""

Controls: TypeAlias = Mapping[str, Array]
"""Per-token coefficients of a write rule, by name."""

State: TypeAlias = Any
"""A memory's state: a NamedTuple of arrays that only the memory itself looks into."""

Start: TypeAlias = Literal["independent", "checkpoint"]
"""What a segment's memory begins with: the initial state, or the state before the segment."""

Implementation: TypeAlias = Literal["xla", "pallas_tpu", "pallas_gpu", "reference"]
"""How the equations are computed."""

Exchange: TypeAlias = Literal["gather", "ring"]
"""How parts of a sequence on several devices get each other's states."""

__all__ = [
    "Apply",
    "Array",
    "Bool",
    "Controls",
    "Exchange",
    "Float",
    "Implementation",
    "Int",
    "Matrices",
    "Start",
    "State",
]
