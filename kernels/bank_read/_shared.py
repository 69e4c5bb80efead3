"""What the kernels of the bank read share: the order in which they visit a plan's pairs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memcache_jax._typing import Array, Int

_BITS = 15  # of a packed pair that hold its slot
MAX_SLOTS = 2**_BITS
_MAX_STATES = 2 ** (31 - _BITS)  # of a chunk: a packed pair must not be negative


class Runs(NamedTuple):
    """Pairs sorted into runs, each of one block and one chunk of states; lists of int32.

    Attributes:
      block: (rows * runs) the block of each run.
      chunk: (rows * runs) its chunk of states.
      begin: (rows * (runs + 1)) its first pair; the last entry is the number of pairs.
      pairs: (rows * pairs) packed (state within its chunk, slot), negative for no state.
    """

    block: Array | np.ndarray
    chunk: Array | np.ndarray
    begin: Array | np.ndarray
    pairs: Array | np.ndarray


def make_runs(
    reads: np.ndarray | Array, num_states: int, chunk_size: int, *, by_chunk: bool
) -> Runs:
    """Lists the pairs of a plan (n, r), or (b, n, r) row by row, for chunks of ``chunk_size``.

    Every block (with ``by_chunk``, every chunk) has a run, so that all of an output is written, and
    its runs are consecutive. A static plan's empty slots are left out.
    """
    chunks = -(-num_states // chunk_size)
    blocks, slots = reads.shape[-2:]
    majors = chunks if by_chunk else blocks

    def lists(xp: Any, block: Any, slot: Any, state: Any, runs: int | None) -> tuple:
        chunk = xp.where(state >= 0, state, 0) // chunk_size
        chunk = xp.concatenate([chunk, xp.arange(majors) if by_chunk else xp.zeros(majors, int)])
        block = xp.concatenate([block, xp.zeros(majors, int) if by_chunk else xp.arange(majors)])
        packed = xp.where(state >= 0, state % chunk_size << _BITS | slot, -1)
        packed = xp.concatenate([packed, xp.full(majors, -1)])
        key = chunk * blocks + block if by_chunk else block * chunks + chunk
        if runs is None:  # a block or chunk with a real pair needs no filler
            major = chunk if by_chunk else block
            needed = np.append(state >= 0, ~np.isin(major[len(state) :], major[: len(state)]))
            key, block, chunk, packed = (x[needed] for x in (key, block, chunk, packed))
        order = xp.argsort(key, stable=True)
        key = key[order]
        run = xp.cumsum(xp.append(xp.zeros(1, int), (key[1:] != key[:-1]).astype(int)))
        size = run[-1] + 1 if runs is None else runs
        begin = xp.searchsorted(run, xp.arange(size + 1))
        # Runs beyond the last one are empty, and repeat its block and chunk.
        some = order[xp.minimum(begin[:-1], len(order) - 1)]
        return block[some], chunk[some], begin, packed[order]

    block, slot = (x.reshape(-1) for x in np.indices((blocks, slots)))
    if isinstance(reads, np.ndarray) and reads.ndim == 2:
        real = reads.reshape(-1) >= 0
        made = lists(np, block[real], slot[real], reads.reshape(-1)[real], None)
        return Runs(*(x.astype(np.int32) for x in made))
    runs = min(blocks * slots + majors, blocks * chunks)

    def row(reads: Int[Array, "n r"]) -> tuple:
        return lists(jnp, jnp.asarray(block), jnp.asarray(slot), reads.reshape(-1), runs)

    made = jax.vmap(row)(jnp.asarray(reads))
    return Runs(*(x.astype(jnp.int32).reshape(-1) for x in made))


def plan_reasons(
    reads: np.ndarray | Array, num_states: int, chunk_size: int
) -> list[tuple[bool, str]]:
    """Refuses plans whose numbers do not fit into 32 bits, for ``check_served``."""
    blocks, slots = reads.shape[-2:]
    chunk_size = min(chunk_size, num_states)
    return [
        (slots > MAX_SLOTS, f"a block that reads {slots} states, more than {MAX_SLOTS}"),
        (chunk_size > _MAX_STATES, f"{chunk_size} states at once, more than {_MAX_STATES}"),
        (
            blocks * num_states >= 2**31 and not isinstance(reads, np.ndarray),
            f"{blocks} blocks times {num_states} states, which is 2^31 or more",
        ),
    ]


def unpack(pair: Array) -> tuple[Array, Array]:
    """The state within its chunk and the slot of a packed pair."""
    return lax.shift_right_logical(pair, np.int32(_BITS)), pair & np.int32(MAX_SLOTS - 1)


def differentiable(kernels: Any) -> Callable[..., Array]:
    """Returns the gated read of ((runs by block, runs by chunk), bank, query, weights).

    Args:
      kernels: has ``forward``, ``backward_rows`` and ``backward_bank`` on arrays (units, ...);
        weights are the gates by slot.
    """

    @jax.custom_vjp
    def gated_read(orders, bank, query, weights):
        return kernels.forward(orders[0], bank, query, weights)

    def forward(orders, *arrays):
        return gated_read(orders, *arrays), (orders, arrays)

    def backward(residuals, cotangent):
        (by_block, by_chunk), arrays = residuals
        d_query, d_weights = kernels.backward_rows(by_block, arrays, cotangent)
        d_bank = tuple(kernels.backward_bank(by_chunk, arrays, cotangent))
        gradients = (d_bank, d_query, d_weights)
        return None, *jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, arrays)

    gated_read.defvjp(forward, backward)
    return gated_read
