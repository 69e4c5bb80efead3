"""The chunked update on GPUs, which no kernel serves; matrix memories have the affine update."""

from collections.abc import Callable
from typing import Any, NoReturn

from memcache_jax.kernels._dispatch import check_served


def chunk_update(
    chunk: Callable[[Any, Any], tuple[Any, Any]], state: Any, rows: Any, batch_dims: int
) -> NoReturn:
    """Raises CannotServeError.

    With momentum a deep memory's state has 16 k^2 numbers, and every layer's change needs the whole
    of it. A program's registers hold that for k = 32 at most.
    """
    del chunk, state, rows, batch_dims
    reason = "a deep memory's state does not fit into the registers of a Triton program"
    check_served("chunk_update", "pallas_gpu", [(True, reason)])
    raise AssertionError
