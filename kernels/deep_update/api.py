"""Entry point of the deep update."""

from memcache_jax._typing import Array, Float
from memcache_jax.kernels._dispatch import choose, implementations
from memcache_jax.kernels.deep_update.form import DescentChunk, Loss, Parts

_IMPLEMENTATIONS = implementations("deep_update", "reference", "pallas_gpu")


def deep_update(
    form: DescentChunk,
    given: Parts,
    goes_on: Float[Array, "units chunks"],
    *,
    loss: Loss,
    implementation: str,
) -> Parts:
    """Returns the states that the chunks of deep memories start from.

    With these, all chunks can be written and read side by side.

    Args:
      form: the chunks, arrays (units, chunks, ...).
      given: the states that runs of chunks start from, arrays (units, chunks, ...).
      goes_on: 1 where a chunk starts from the end of the one before, 0 where it starts from the
        given state; 0 for the first chunk.
      loss: the inner loss.
      implementation: ``"reference"`` or ``"pallas_gpu"``.

    Returns:
      The states, arrays (units, chunks, ...).

    Raises:
      ValueError: for an unknown implementation.
      NotImplementedError: if the implementation is missing or cannot take these arguments, with the
        reasons.
    """
    update = choose("deep_update", _IMPLEMENTATIONS, implementation)
    return update(form, given, goes_on, loss)
