"""A cache of the user's own: in a language model's streams, and by itself."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import assert_close

LENGTH, VOCAB = 19, 23


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeclaredCache(mc.nn.MixerCache):
    """The sum of a row's inputs, and all of them as what is large."""

    total: Any
    inputs: Any
    position: Any
    first: Any = None

    shared = ("inputs",)
    small = zeroed = ("total", "position")


class WrittenOutCache(NamedTuple):
    """The same, by its methods alone."""

    total: Any
    inputs: Any
    position: Any
    first: Any = None

    @property
    def states(self):
        return (self.inputs,)

    def with_states(self, states, first=None):
        return self._replace(inputs=states[0], first=first)

    def empty_states(self, rows, *layers):
        return (jnp.zeros((*layers, rows, *self.inputs.shape[1:]), self.inputs.dtype),)

    def reset(self, rows):
        total = jnp.where(rows[:, None], 0, self.total)
        return self._replace(total=total, position=jnp.where(rows, 0, self.position))

    def reset_states(self, rows, axis=0):
        return (jnp.where(rows[:, None, None], 0, self.inputs),)

    def take_small(self, rows):
        return self._replace(total=self.total[rows], position=self.position[rows])

    def take_states(self, rows, axis=0):
        return (jnp.take(self.inputs, rows, axis=axis),)

    def replace(self, **changes):
        return self._replace(**changes)


class Sums(nnx.Module):
    """y_t = W (sum of x up to t - sum over j <= t of x_j / 2), the latter from all inputs."""

    def __init__(self, features, kind, rngs):
        self.out = nnx.Linear(features, features, rngs=rngs)
        self.kind = kind

    def __call__(self, x):
        return self.out(jnp.cumsum(x, axis=1) / 2)

    def init_cache(self, batch_size, max_length=None, **options):
        features = self.out.in_features
        total, inputs = (jnp.zeros(s) for s in ((features,), (max_length, features)))
        total, inputs = (jnp.tile(x[None], (batch_size, *[1] * x.ndim)) for x in (total, inputs))
        return self.kind(total, inputs, jnp.zeros(batch_size, int))

    def extend(self, x, cache, lengths=None):
        lengths = jnp.full(len(x), x.shape[1]) if lengths is None else lengths
        at = jnp.arange(x.shape[1])[None]
        x = jnp.where((at < lengths[:, None])[..., None], x, 0)
        rows = jnp.arange(len(x))[:, None]
        own = cache.first, rows, cache.position[:, None] + at
        inputs = cache.inputs.at[own].add(x, mode="drop")
        before = inputs[cache.first]
        there = jnp.arange(before.shape[1])[None, None] <= (cache.position[:, None] + at)[..., None]
        half = jnp.einsum("bts,bsd->btd", there.astype(x.dtype), before) / 2
        y = self.out(cache.total[:, None] + jnp.cumsum(x, axis=1) - half)
        return y, cache.replace(
            total=cache.total + x.sum(axis=1), inputs=inputs, position=cache.position + lengths
        )


@dataclasses.dataclass(frozen=True)
class SumsMixer:
    kind: Any

    def build(self, in_features, num_heads, *, rngs, **options):
        return Sums(in_features, self.kind, rngs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DeclaredCache, WrittenOutCache])
def test_a_cache_of_the_users_own(kind):
    caching = mc.nn.MemoryCachingMixer(mc.memories.RetNet(), mc.GRM(), mc.Constant(8))
    config = mc.nn.LanguageModelConfig(
        vocab_size=VOCAB, num_layers=4, features=16, num_heads=2, mixers=(SumsMixer(kind), caching)
    )
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    extend = jax.jit(
        lambda tokens, cache, lengths: nnx.merge(graph, state).extend(tokens, cache, lengths),
        donate_argnums=1,
    )
    tokens = jax.random.randint(jax.random.key(0), (3, LENGTH), 0, VOCAB)
    wanted = np.asarray(nnx.jit(lambda model, tokens: model.hidden(tokens))(model, tokens))
    cache = model.init_cache(3, LENGTH)
    hidden, cache = extend(tokens[:, :9], cache, jnp.array([9, 4, 9]))
    assert_close(hidden[1, :4], wanted[1, :4], 2e-5)
    # Row 0 goes on, row 1 ends, and row 2 begins anew, twice.
    cache = cache.reset(jnp.array([False, False, True])).take(jnp.array([0, 2, 2]))
    assert cache.position.tolist() == [9, 0, 0]
    hidden, cache = extend(tokens[np.array([0, 2, 1])][:, :9], cache, jnp.array([0, 9, 9]))
    assert_close(hidden[1:], wanted[np.array([2, 1]), :9], 2e-5)
    rest = tokens[np.array([0, 2, 1]), 9:]
    hidden, cache = extend(rest, cache, jnp.full(3, LENGTH - 9))
    assert_close(hidden, wanted[np.array([0, 2, 1]), 9:], 2e-5)
    bytes_of = mc.nn.cache_bytes(cache)
    large = bytes_of["inputs"] if kind is DeclaredCache else bytes_of["other"]
    assert large >= 2 * 3 * LENGTH * 16 * 4


def test_rows_of_a_cache_alone():
    features, rows = 4, jnp.arange(3.0)
    cache = DeclaredCache(
        jnp.tile(rows[:, None], (1, features)),
        jnp.tile(rows[:, None, None], (1, 5, features)),
        jnp.array([1, 2, 3]),
    )
    assert cache.nbytes == 3 * (4 + 5 * 4 + 1) * 4
    taken = cache.take(np.array([2, 2, 0]))
    assert taken.position.tolist() == [3, 3, 1]
    assert taken.inputs[:, 0, 0].tolist() == [2, 2, 0]
    reset = taken.reset(np.array([True, False, False]))
    assert reset.position.tolist() == [0, 3, 1]
    assert reset.total[:, 0].tolist() == reset.inputs[:, 0, 0].tolist() == [0, 2, 0]
    with pytest.raises(ValueError, match="the cache has the rows 0 to 2, got"):
        cache.take(np.array([3]))
    for marks in ([0, 2], [True, False], [1, 0, 0], None):
        with pytest.raises(ValueError, match=r"marked by booleans \(b,\) = \(3,\), got"):
            cache.reset(np.array(marks))
    with pytest.raises(TypeError, match=r"Forgetful.count must be in one of \['common', 'nested'"):

        class Forgetful(DeclaredCache):
            count: Any

    second = cache.with_states((jnp.zeros((2, 3, 5, features)),), first=1)
    written = second.put_rows(second.inputs, jnp.ones((3, 5, features)))
    assert written[:, :, 0, 0].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert second.own_rows(written).min() == 1
