"""What travels through the engine, by name; axes as in the legend of ``_typing``."""

from collections.abc import Callable
from typing import Any, NamedTuple

from memcache_jax._typing import Array, Controls, Float, Int, State
from memcache_jax.memories import Memory


class Tokens(NamedTuple):
    """The tokens of a sequence with all their controls; cut into blocks, (b, h, n, c, ...)."""

    query: Float[Array, "b h t k"]
    key: Float[Array, "b h t k"]
    value: Float[Array, "b h t v"]
    connector: Float[Array, "b h t u"]
    controls: Controls


class Rows(NamedTuple):
    """The tokens of chunks (b, h, n, chunks, m, ...), as far as writing and live reads take them.

    Attributes:
      begun: how many documents have begun in the chunk, up to and with each token, as a float, so
        that a program has a cotangent for it; None where no documents are packed.
    """

    query: Float[Array, "b h n chunks m k"]
    key: Float[Array, "b h n chunks m k"]
    value: Float[Array, "b h n chunks m v"]
    controls: Controls
    begun: Float[Array, "b h n chunks m"] | None = None


class Blocks(NamedTuple):
    """Tokens cut into a plan's blocks, filled up at the end with zeros that no real token sees.

    Attributes:
      tokens: (b, h, n, c, ...).
      document: the number of each token's document; None where no documents are packed.
      rows: the same tokens chunk by chunk.
    """

    tokens: Tokens
    document: Int[Array, "b n c"] | None
    rows: Rows


class Writing(NamedTuple):
    """How memories are written.

    Attributes:
      memory: the rule.
      needs: the parts of the live memory to keep, as ``Aggregation.needs`` names them.
      initial: makes the states before a run's first token, of a shape (b, h, ...).
      implementation: of the writing operations.
    """

    memory: Memory
    needs: tuple[str, ...]
    initial: Callable[[tuple[int, ...]], State]
    implementation: str | None

    def with_no_reads(self) -> "Writing":
        """The same, keeping nothing of the live memory."""
        return self._replace(needs=())


Kept = dict[str, Any]
"""The parts of the live memory that were kept, arrays (b, h, n, chunks, ...); see ``read.keep``."""
