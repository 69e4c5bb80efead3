"""How a sweep of TPU kernels over chunks divides its work, so that it fits into VMEM."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from memcache_jax.kernels._dispatch import check_served
from memcache_jax.kernels._sweep_blocks import is_inside, units_first, wide_shape
from memcache_jax.kernels._tpu import LANES, vmem_left, vmem_reason


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How much work a program does at once.

    Attributes:
      units: memories that one program carries side by side.
      group: chunks between two states that the forward pass keeps for the backward one.
      start_bytes: memory for the states that the chunks of a group start from.
      state_work: the most memory that a step needs for itself, in multiples of the states.
      row_work: the same, in multiples of a chunk's rows.
    """

    units: int
    group: int
    start_bytes: int
    state_work: int
    row_work: int


class Sweep(NamedTuple):
    """How a sweep divides its work.

    Attributes:
      name: prefix of the kernels' names.
      together: memories that one program carries, and whose blocks it has.
      side: how many of them it works on side by side, a divisor.
      group: chunks between two kept states.
      every: groups between two returned states.
      forward_bytes: estimate of the VMEM that the forward pass needs.
      backward_bytes: the same for the backward pass.
    """

    name: str
    together: int
    side: int
    group: int
    every: int
    forward_bytes: int
    backward_bytes: int


def plan(name: str, state: Any, rows: Any, y: Any, keep: int, blocks: Blocks) -> Sweep:
    """Divides a sweep over states (units, ...) that returns the state after every ``keep`` chunks.

    Raises:
      CannotServeError: if the forward or the backward pass does not fit into VMEM.
    """
    units = len(jax.tree.leaves((state, units_first(rows)))[0])
    size = max(_bytes(state) // max(units, 1), 1)
    fits = max(blocks.start_bytes // size, 1)
    side = _divisor(units, min(blocks.units, fits))
    of_state = _tiles(state, 1)
    of_rows, of_y = (_tiles(units_first(x), 2) for x in (rows, y))
    work = min(blocks.state_work * of_state, blocks.row_work * of_rows)

    def of(together: int) -> Sweep:
        part = _divisor(together, side)
        # Blocks are double-buffered, and cotangents held once more while they are computed.
        fixed = together * (10 * of_state + 6 * of_rows + 2 * of_y) + part * work
        room = vmem_left(fixed) // max(together * of_state, 1)
        group = _divisor(keep, min(blocks.group, max(fits // together, 1), room))
        forward, backward = fixed - together * 4 * of_rows, fixed + together * group * of_state
        return Sweep(name, together, part, group, keep // group, forward, backward)

    def reason(sweep: Sweep) -> tuple[bool, str]:
        return vmem_reason(("forward", sweep.forward_bytes), ("backward", sweep.backward_bytes))

    every = [of(together) for together in _of_heads((rows, y)) or [side]]
    chosen = next((sweep for sweep in every if not reason(sweep)[0]), every[-1])
    check_served(name, "pallas_tpu", [reason(chosen)])
    return chosen


def plan_heads(
    name: str, state: Any, given: Any, rows: Any, y: Any, keep: int, blocks: Blocks
) -> Sweep:
    """``plan`` for ``_sweep_heads``: the longest groups that fit, then the most heads.

    What memories begin with, ``given``, has fewer units than ``state`` where they share it.

    Raises:
      CannotServeError: if the forward or the backward pass does not fit into VMEM.
    """
    of_state, of_rows, of_y = _tiles(state, 1), *(_tiles(units_first(x), 2) for x in (rows, y))
    leaves = jax.tree.leaves((rows, y), is_leaf=is_inside)
    widest = max(x.heads.dtype.itemsize for x in leaves if is_inside(x))
    work = min(blocks.state_work * of_state, blocks.row_work * of_rows)
    shared = len(jax.tree.leaves(given)[0]) < len(jax.tree.leaves(state)[0])

    def of(heads: int, group: int) -> Sweep:
        first = 2 * _tiles(given, 1) * (heads if shared else 1)
        # Tokens of a group, transposed, and blocks of one chunk, double-buffered, one in float32.
        rows, y = (heads * x * widest // 4 for x in (of_rows, of_y))
        tokens = group * (rows + y) + 4 * rows + 2 * y + heads * 2 * max(of_rows, of_y)
        forward = (heads + 4) * of_state + first + work + tokens
        backward = (heads + group + 5) * of_state + 2 * first + work + tokens
        return Sweep(name, heads, 1, group, keep // group, forward, backward)

    def fits(sweep: Sweep) -> bool:
        return vmem_left(max(sweep.forward_bytes, sweep.backward_bytes)) > 0

    groups = [size for size in range(min(blocks.group, keep), 0, -1) if keep % size == 0]
    parts = _of_heads((rows, y), 8)
    every = [of(heads, group) for group in groups for heads in parts]
    chosen = next(filter(fits, every), every[-1])
    needs = ("forward", chosen.forward_bytes), ("backward", chosen.backward_bytes)
    check_served(name, "pallas_tpu", [vmem_reason(*needs)])
    return chosen


def _of_heads(tree: Any, tile: int = 16) -> list[int]:
    """How many heads a block of arrays with heads inside may have: all, or whole tiles."""
    leaves = jax.tree.leaves(tree, is_leaf=is_inside)
    heads = {x.heads.shape[3] for x in leaves if is_inside(x)}
    if not heads:
        return []
    (every,) = heads
    tiles = [size for size in range(tile, every, tile) if every % size == 0]
    return [every, *reversed(tiles)]


def _tiles(tree: Any, lead: int) -> int:
    """Bytes that the blocks of one memory take in VMEM, in float32."""

    def tiles(x: Any) -> int:
        *rest, last = wide_shape(x, lead)[lead:]
        return 4 * math.prod([-(-rest[-1] // 8) * 8, -(-last // LANES) * LANES, *rest[:-1]])

    return sum(map(tiles, jax.tree.leaves(tree)))


def _bytes(tree: Any) -> int:
    return sum(x.size * 4 for x in jax.tree.leaves(tree))


def _divisor(size: int, most: int) -> int:
    """The largest divisor of ``size`` that is at most ``most``, or 1."""
    return max(part for part in range(1, max(most, 1) + 1) if size % part == 0)
