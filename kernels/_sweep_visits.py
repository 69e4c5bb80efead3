"""The grid of sweeps that visit one head after the other, and their blocks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memcache_jax.kernels._sweep_blocks import is_inside, mapped, specs, units_first
from memcache_jax.kernels._sweep_plan import Sweep


class Visits(NamedTuple):
    """A grid (programs p, runs n, groups j, steps s) for rows with heads inside.

    The steps of a group are loads, the visits of each head, and stores. Consecutive runs of a head
    may share what they begin with: one program then carries them in order, and what its heads begin
    with stays in VMEM meanwhile.

    Attributes:
      units: memories.
      runs: runs that share what they begin with.
      heads: heads that a program carries.
      parts: programs for all heads.
      groups: groups of chunks.
      length: chunks of a group.
      visits: visits of a head in a group.
    """

    units: int
    runs: int
    heads: int
    parts: int
    groups: int
    length: int
    visits: int

    @classmethod
    def of(cls, sweep: Sweep, given: Any, rows: Any, each: int) -> "Visits":
        """Those of a sweep with ``each`` visits per chunk and head."""
        units = len(jax.tree.leaves(units_first(rows))[0])
        inside = filter(is_inside, jax.tree.leaves(rows, is_leaf=is_inside))
        parts = next(inside).heads.shape[3] // sweep.together
        runs = units // len(jax.tree.leaves(given)[0])
        visits = each * sweep.group
        return cls(units, runs, sweep.together, parts, sweep.every, sweep.group, visits)

    @property
    def grid(self) -> tuple[int, ...]:
        """The sizes of the grid."""
        steps = 2 * self.length + self.heads * self.visits
        return self.units // self.heads // self.runs, self.runs, self.groups, steps

    def loads(self, s: Any) -> Any:
        """The chunk of the group that step s transposes into VMEM, or the last one."""
        return jnp.minimum(s, self.length - 1)

    def head(self, s: Any) -> Any:
        """The head that step s visits, or the nearest."""
        head = lax.div(s - np.int32(self.length), np.int32(self.visits))
        return jnp.clip(head, 0, self.heads - 1)

    def visit(self, s: Any) -> Any:
        """Which visit of the head it is, or the nearest."""
        return jnp.clip(s - self.length - self.head(s) * self.visits, 0, self.visits - 1)

    def stores(self, s: Any) -> Any:
        """The chunk whose results step s transposes back, or the first one."""
        return jnp.clip(s - self.length - self.heads * self.visits, 0, self.length - 1)

    def when(self, s: Any, load: Callable, visit: Callable, store: Callable) -> None:
        """Calls the action of step s, with its chunk, or its head and visit."""
        visited = self.length + self.heads * self.visits
        pl.when(s < self.length)(lambda: load(self.loads(s)))
        pl.when((s >= self.length) & (s < visited))(lambda: visit(self.head(s), self.visit(s)))
        pl.when(s >= visited)(lambda: store(self.stores(s)))

    def block(self, p: Any, n: Any) -> Any:
        """Which block of ``heads`` units a program carries in a run."""
        if self.runs == 1:
            return p
        parts, runs = np.int32(self.parts), np.int32(self.runs)
        return (lax.div(p, parts) * runs + n) * parts + lax.rem(p, parts)

    def unit(self, p: Any, n: Any, s: Any) -> Any:
        """The memory that step s visits, or the nearest."""
        return self.block(p, n) * self.heads + self.head(s)

    def in_first(self, p: Any, n: Any, j: Any, s: Any) -> tuple:
        """An index of units whose blocks are loaded in the first group alone."""
        last = self.block(p, n) * self.heads + self.heads - 1
        return (jnp.where(j == 0, self.unit(p, n, s), last),)

    def in_last(self, p: Any, n: Any, j: Any, s: Any) -> tuple:
        """An index of units whose blocks are stored in the last group alone."""
        first = self.block(p, n) * self.heads
        return (jnp.where(j == self.groups - 1, self.unit(p, n, s), first),)

    def of_given(self, index: Callable[..., tuple], given: Any) -> Any:
        """Blocks of what memories begin with: of one by index, or of all heads if runs share it."""
        if self.runs == 1:
            return specs(1, 1, index, given)
        return specs(self.heads, 1, lambda p, *_: (p,), given)

    def at(self, head: Any) -> Any:
        """Where these blocks have a head."""
        return slice(None) if self.runs == 1 else pl.ds(head, 1)

    def of_rows(self, turns: Callable, chunk: Callable, tree: Any, inside: Callable) -> Any:
        """Blocks of one chunk: of all heads where a step ``turns`` it, or of the head of a visit.

        Args:
          turns: from a step to the chunk of the group.
          chunk: from a group and a visit to a chunk.
          tree: the rows.
          inside: from a group and a chunk of it to a chunk.
        """

        def of(x: Any) -> Any:
            if is_inside(x):
                return specs(
                    self.heads, 2, lambda p, n, j, s: (self.block(p, n), inside(j, turns(s))), x
                )
            return specs(1, 2, lambda p, n, j, s: (self.unit(p, n, s), chunk(j, self.visit(s))), x)

        return mapped(of, tree)

    def turned(self, tree: Any) -> list:
        """Vector memory (length, heads, m, k) for each array with heads inside."""
        arrays = [x.heads for x in jax.tree.leaves(tree, is_leaf=is_inside) if is_inside(x)]
        return [
            pltpu.VMEM((self.length, self.heads, x.shape[2], x.shape[4]), x.dtype) for x in arrays
        ]


def turn(refs: Any, turned: list, c: Any) -> None:
    """Transposes blocks with heads inside into a chunk's place in VMEM."""
    for ref, into in zip(_inside(refs), turned, strict=True):
        into[c] = jnp.swapaxes(ref[0, 0].astype(jnp.float32), 0, 1).astype(into.dtype)


def turn_back(refs: Any, turned: list, c: Any) -> None:
    """Transposes a chunk back into blocks with heads inside."""
    for ref, of in zip(_inside(refs), turned, strict=True):
        ref[0, 0] = jnp.swapaxes(of[c].astype(jnp.float32), 0, 1).astype(ref.dtype)


def rows_at(refs: Any, like: Any, turned: list, c: Any, head: Any) -> Any:
    """The rows (1, ...) of a head in a chunk, in float32."""
    each = iter(turned)

    def of(ref: Any, x: Any) -> Any:
        block = next(each)[c, pl.ds(head, 1)] if is_inside(ref) else ref[...]
        return block.reshape(1, *x.shape[2:]).astype(jnp.float32)

    return mapped(of, refs, like)


def fill_at(turned: list, arrays: list, c: Any, head: Any) -> None:
    """Fills a head's place in a chunk."""
    for ref, x in zip(turned, arrays, strict=True):
        ref[c, pl.ds(head, 1)] = x.astype(ref.dtype)


def _inside(refs: Any) -> list:
    return [x.heads for x in jax.tree.leaves(refs, is_leaf=is_inside) if is_inside(x)]
