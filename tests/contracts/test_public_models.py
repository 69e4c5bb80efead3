"""Public models go back, are found again by their prefixes, and take drafts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import assert_close
from tests.covers import first_kept

FOLDER, PIECE = Path(__file__).parents[1] / "data" / "pretrained", 6


@pytest.mark.parametrize("family", first_kept(1, ["qwen3_next", "fla_rwkv7", "mamba2"]))
def test_rewind_and_prefixes(family):
    model = mc.pretrained.load(FOLDER / family)
    graph, state = nnx.split(model)
    extend = jax.jit(lambda tokens, cache: nnx.merge(graph, state).extend(tokens, cache))
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=3 * PIECE)
    first, middle, last = (jnp.asarray(x[None], jnp.int32) for x in np.split(tokens, 3))
    _, one = extend(first, model.init_cache(1, 40, rewind=4))
    _, two = extend(middle, one)
    wanted, _ = extend(last, two)
    # Back over what another end wrote, and then the same tokens again, one by one as they were.
    _, astray = extend(last, two)
    back = astray.rewind(np.array([4])).rewind(np.array([0]))
    assert back.position.tolist() == [2 * PIECE + 2]
    shifted = jnp.concatenate([last[:, 2:], first[:, :2]], axis=1)
    assert_close(extend(shifted, back)[0][:, :4], wanted[:, 2:], 1e-5)
    store = mc.PrefixStore(10**8)
    for count, cache in ((PIECE, one), (2 * PIECE, two)):
        store.insert(tokens[:count], cache)
    found, known = store.match(tokens)
    assert known == 2 * PIECE
    np.testing.assert_array_equal(extend(last, found)[0], wanted)


@pytest.mark.slow
def test_drafts():
    model = mc.pretrained.load(FOLDER / "qwen3_next")
    prompt = np.tile(np.arange(5), 3)[None]
    plain = mc.generate(model, prompt, 24, temperature=0)
    drafted = mc.generate(model, prompt, 24, temperature=0, draft=mc.NGrams(tokens=4))
    np.testing.assert_array_equal(drafted, plain)
