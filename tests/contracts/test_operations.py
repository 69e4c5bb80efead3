"""Any order of operations on caches and a store gives what reading all tokens again does.

OPERATIONS=10000 pytest tests/contracts/test_operations.py
"""

import collections
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import assert_close
from tests.generation.test_rewind_to import CACHING, LENGTH, ROWS, VOCAB, model_of

OPERATIONS, MOST, PIECE = int(os.environ.get("OPERATIONS", "150")), 3, 5
CHANCES = dict(
    extend=0.4, rewind=0.12, rewind_to=0.13, reset=0.05, take=0.08, insert=0.12, match=0.1
)


class Rows:
    """A cache of several rows, a store, and the tokens that should be in them."""

    def __init__(self, seed):
        self.rng, self.model = (
            np.random.default_rng(seed),
            model_of(CACHING, mc.nn.AttentionMixer()),
        )
        graph, state = nnx.split(self.model)
        self._extend = jax.jit(
            lambda *args: nnx.merge(graph, state).extend(*args), donate_argnums=1
        )
        self._whole = jax.jit(lambda tokens: nnx.merge(graph, state).hidden(tokens))
        self._take = jax.jit(lambda cache, rows: cache.take(rows))
        self._reset = jax.jit(lambda cache, rows: cache.reset(rows))
        self._put = jax.jit(lambda cache, row, one: cache.put(row, one))
        self.cache = self.model.init_cache(ROWS, LENGTH, rewind=MOST, keep_ends=True)
        empty = self.model.init_cache(1, LENGTH, rewind=MOST, keep_ends=True)
        self.store = mc.PrefixStore(5 * empty.nbytes)  # which is too small for all that comes
        self.told = [[] for _ in range(ROWS)]
        self.inserted, self.done = [], collections.Counter()

    def step(self):
        kind = self.rng.choice([*CHANCES], p=[*CHANCES.values()])
        getattr(self, kind)()
        self.done[kind] += 1
        assert self.cache.position.tolist() == [len(row) for row in self.told]
        assert self.store.nbytes <= self.store.max_bytes

    def extend(self):
        new = self.rng.integers(VOCAB, size=(ROWS, PIECE))
        begin = np.array([len(row) for row in self.told])
        lengths = np.array([self.rng.integers(min(PIECE, LENGTH - at) + 1) for at in begin])
        hidden, self.cache = self._extend(jnp.asarray(new), self.cache, jnp.asarray(lengths))
        for row, ids, count in zip(self.told, new.tolist(), lengths, strict=True):
            row += ids[:count]
        wanted = self._whole(jnp.array([row + [0] * (LENGTH - len(row)) for row in self.told]))
        hidden, wanted = np.asarray(hidden), np.asarray(wanted)
        for row, (at, count) in enumerate(zip(begin, lengths, strict=True)):
            assert_close(hidden[row, :count], wanted[row, at : at + count], 3e-5, scale=3.0)

    def rewind(self):
        taken = self.rng.integers(np.asarray(self.cache.rewindable) + 1)
        self.cache = self.cache.rewind(taken)
        self.told = [row[: len(row) - count] for row, count in zip(self.told, taken, strict=True)]

    def rewind_to(self):
        then = np.array([self.rng.integers(len(row) + 1) for row in self.told])
        tokens = np.array([row + [0] * (LENGTH - len(row)) for row in self.told])
        self.cache = mc.rewind_to(self.model, self.cache, tokens, then)
        self.told = [row[:count] for row, count in zip(self.told, then, strict=True)]

    def reset(self):
        marks = np.arange(ROWS) == self.rng.integers(ROWS)
        self.cache = self._reset(self.cache, marks)
        self.told = [[] if mark else row for mark, row in zip(marks, self.told, strict=True)]

    def take(self):
        order = self.rng.integers(ROWS, size=ROWS)
        self.cache = self._take(self.cache, order)
        self.told = [list(self.told[row]) for row in order]

    def insert(self):
        row = self.rng.integers(ROWS)
        one = self._take(self.cache, np.array([row]))
        assert self.store.insert(self.told[row], one)
        self.inserted.append(list(self.told[row]))

    def match(self):
        """Looks for what was inserted, perhaps long ago, and goes on with another end."""
        if not self.inserted:
            return
        known = self.inserted[-1 - self.rng.integers(min(9, len(self.inserted)))]
        cut = self.rng.integers(len(known) + 1)
        found, count = self.store.match([*known[:cut], VOCAB - 1, 0])
        if found is not None:
            row = self.rng.integers(ROWS)
            self.cache = self._put(self.cache, jnp.int32(row), found)
            self.told[row] = [*known[:cut], VOCAB - 1][:count]


@pytest.mark.slow
def test_any_order():
    rows = Rows(seed=0)
    for _ in range(OPERATIONS):
        rows.step()
    assert len(rows.done) == len(CHANCES)
    if OPERATIONS > 1000:
        assert len(rows.store) < len({tuple(told) for told in rows.inserted})  # some have gone
    print(dict(rows.done), "caches in the store:", len(rows.store))
