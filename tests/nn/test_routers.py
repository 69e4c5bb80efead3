"""Noise on routers' scores, and the load-balancing loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.routers import noisy as with_noise

SIZE, TOP_K = 4, 2


def layer_of(aggregation=None, segmentation=None, **options):
    return mc.nn.MemoryCaching(
        8,
        2,
        memory=mc.memories.SSD(),
        aggregation=aggregation or mc.SSC(top_k=TOP_K),
        segmentation=segmentation or mc.Constant(SIZE),
        rngs=nnx.Rngs(0),
        **options,
    )


def inputs(length=30):
    return jax.random.normal(jax.random.key(1), (2, length, 8))


def loss_of(layer, x, *documents):
    _, losses = nnx.capture(layer, mc.nn.RouterLoss)(x, *documents)
    (loss,) = losses["router_loss"].get_value()
    return loss


def balance(layer, x, document):
    """The equation, token by token."""
    operands = layer.operands(x, jnp.asarray(document))
    key, connector = (np.asarray(operands[name]) for name in ("key", "connector"))
    batch, length, heads, _ = key.shape
    selected, probability, tokens = np.zeros((3, heads, length // SIZE))
    for b, t, h in np.ndindex(batch, length, heads):
        ends = [s for s in range(t // SIZE) if document[b, s * SIZE + SIZE - 1] == document[b, t]]
        if len(ends) <= TOP_K:
            continue
        scores = np.zeros(len(ends))
        for i, s in enumerate(ends):
            own = slice(s * SIZE, (s + 1) * SIZE)
            same = document[b, own] == document[b, t]
            scores[i] = connector[b, t, h] @ key[b, own, h][same].mean(axis=0)
        shares = np.exp(scores) / np.exp(scores).sum()
        for i, s in enumerate(ends):
            selected[h, s] += len(ends) / TOP_K * (i in np.argsort(-scores)[:TOP_K])
            probability[h, s] += len(ends) * shares[i]
            tokens[h, s] += 1
    of_states = selected * probability / np.maximum(tokens, 1)
    return (of_states.sum(axis=-1) / tokens.sum(axis=-1)).mean()


@pytest.mark.slow
def test_the_loss_is_its_equation():
    """With packed documents, and a last segment that is not full."""
    layer, x = layer_of(), inputs()
    document = np.zeros((2, 30), int)
    document[0, 6:], document[1, 21:] = 1, 1
    got = loss_of(layer, x, jnp.asarray(document))
    np.testing.assert_allclose(got, balance(layer, x, document), rtol=1e-5)
    assert abs(got - 1) > 1e-3


@pytest.mark.slow
def test_a_balanced_router_has_a_loss_of_1_and_it_has_a_gradient():
    """Equal scores give equal probabilities; the router then selects the oldest states."""
    layer, x = layer_of(), inputs(4 * SIZE)
    layer.temperature.set_value(jnp.zeros(2))
    np.testing.assert_allclose(loss_of(layer, x), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(loss_of(layer, x[:, : 3 * SIZE]), 0.0)  # no token has a choice
    layer.temperature.set_value(jnp.full(2, 10.0))
    gradient = nnx.jit(nnx.grad(loss_of))(layer, x)
    assert np.abs(gradient["key"]["kernel"][...]).max() > 1e-3
    assert np.abs(gradient["connector"]["kernel"][...]).max() > 1e-3
    assert not np.abs(gradient["value"]["kernel"][...]).max()


def test_segments_that_tokens_decide_have_no_loss():
    wanted = r"RouterLoss needs segments with a fixed plan.*Adaptive"
    with pytest.raises(ValueError, match=wanted):
        loss_of(layer_of(segmentation=mc.Adaptive(4, 8, block=4)), inputs())


@pytest.mark.slow
def test_layers_of_a_model_draw_their_own_noise_and_leave_their_losses():
    own = mc.nn.MemoryCachingMixer(mc.memories.SSD(), mc.SSC(1), mc.Constant(4))
    shared = mc.nn.MemoryCachingMixer(
        mc.memories.SSD(), mc.SSC(1), mc.Constant(4), states="previous"
    )
    config = mc.nn.LanguageModelConfig(
        20, 4, features=8, num_heads=2, mixers=(own, shared), mlp_features=0, remat=True
    )
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 30), 0, 20)

    @nnx.jit
    def losses_of(model, key):
        noisy = mc.nn.with_router_noise(model, key, 0.5)
        keys = [block.mixer.router_noise.get_value()[0] for block in noisy.layers.blocks]
        logits, losses = nnx.capture(noisy, mc.nn.RouterLoss)(tokens)
        return logits, losses, keys

    logits, losses, keys = losses_of(model, jax.random.key(0))
    raw = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(raw, axis=0)) == 4
    assert [x.shape for x in jax.tree.leaves(losses)] == [(2,), (2,)]
    again, _, _ = losses_of(model, jax.random.key(0))
    np.testing.assert_array_equal(again, logits)
    other, _, _ = losses_of(model, jax.random.key(1))
    assert np.abs(other - logits).max() > 1e-3


@pytest.mark.slow
def test_the_noise_of_scores_has_the_stated_size():
    layer, x = layer_of(), inputs(512)
    noisy = mc.nn.with_router_noise(layer, jax.random.key(0), 0.5)
    plain = layer.operands(x)["connector"]
    noise = with_noise(noisy, noisy.operands(x))["connector"] - plain
    np.testing.assert_allclose(noise.mean(), 0.0, atol=0.1)
    np.testing.assert_allclose(noise.std(), 0.5 * 10 / 2, rtol=0.05)  # k = 4
    np.testing.assert_array_equal(layer(x), layer_of()(x))
    unchanged = mc.nn.with_router_noise(layer, jax.random.key(0), 0)
    np.testing.assert_array_equal(unchanged(x), layer(x))


def test_only_routers_have_noise():
    with pytest.raises(ValueError, match="the model has no layer with SSC and gate='content'"):
        mc.nn.with_router_noise(layer_of(mc.GRM()), jax.random.key(0), 0.5)
    with pytest.raises(ValueError, match=r"scale must be a number of at least 0, got -0\.5"):
        mc.nn.with_router_noise(layer_of(), jax.random.key(0), -0.5)


@pytest.mark.slow
def test_on_a_mesh():
    x, ids = inputs(32), jnp.zeros((2, 32), int).at[:, 17:].set(1)
    layer = layer_of()
    wanted = loss_of(layer, x, ids)
    noisy = mc.nn.with_router_noise(layer, jax.random.key(0), 0.5)
    y = noisy(x, ids)
    mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "tensor"))
    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec("data", "seq")
        placed = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in (x, ids)]
        np.testing.assert_allclose(loss_of(layer_of(), *placed), wanted, rtol=1e-5)
        noisy = mc.nn.with_router_noise(layer_of(), jax.random.key(0), 0.5)
        np.testing.assert_allclose(noisy(*placed), y, rtol=1e-4, atol=1e-5)
