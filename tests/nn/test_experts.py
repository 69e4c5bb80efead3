"""Sparse experts: who goes where, and what comes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import memcache_jax as mc
from memcache_jax.nn.experts import SparseExperts, over_groups
from tests.cases import assert_close
from tests.covers import first_kept


@functools.partial(jax.jit, static_argnames="block")
def through_kernels(rows, groups, kernels, block):
    """Rows by the kernel of their group, and back."""
    return over_groups(
        lambda x, group: (x @ kernels[group]) @ kernels[group].T, rows, groups, 4, block=block
    )


@pytest.mark.parametrize("block", [1, 2, 128])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 0, 1], [3, 3, 3, 3, 3]], ids=str)
def test_rows_of_groups_come_back_in_their_places(chosen, block):
    rng = np.random.default_rng(0)
    rows, kernels = rng.standard_normal((5, 3)), rng.standard_normal((4, 3, 2))
    groups = np.stack([chosen, [2, 0, 3, 1, 2]], axis=1)
    each = kernels[groups] @ np.swapaxes(kernels[groups], -1, -2)
    wanted = np.einsum("nd,nkde->nke", rows, each)
    assert_close(through_kernels(rows, groups, kernels, block=block), wanted, 1e-5)


@pytest.mark.parametrize("probabilities", ["softmax", "top"])
def test_experts_are_the_weighted_sum_of_their_mlps(probabilities):
    experts = mc.nn.Experts(4, 2, 6, 5, probabilities=probabilities, shared_gate=True)
    layer = experts.build(3, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 3)), jnp.float32)

    def by_hand(layer, x):
        logits = layer.router(x)
        chosen = jnp.argsort(-logits, axis=-1)[..., :2]
        weights = jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1))
        gate, up, down = (kernel[...] for kernel in (layer.gate, layer.up, layer.down))
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate))
        every = jnp.einsum("btef,efd->bted", hidden * jnp.einsum("btd,edf->btef", x, up), down)
        routed = jnp.take_along_axis(every, chosen[..., None], axis=2)
        y = jnp.einsum("btkd,btk->btd", routed, weights)
        return y + jax.nn.sigmoid(layer.shared_gate(x)) * layer.shared(x)

    @nnx.jit
    def both(layer, x):
        gradients = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
        return layer(x), by_hand(layer, x), gradients

    y, wanted, gradients = both(layer, x)
    assert_close(y, wanted, 1e-5)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.abs(gradient[...]).max() > 0, path


def gradients_and_output(layer, x):
    def loss(layer, x):
        y = layer(x)
        return jnp.sum(jnp.sin(y)), y

    return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


@pytest.fixture
def shapes(monkeypatch):
    """Of the rows and kernels that each call works on."""
    routed, shapes = SparseExperts._routed, []

    def watched(self, x, logits, gate, up, down, **options):
        shapes.append((len(x), gate.shape, down.shape))
        return routed(self, x, logits, gate, up, down, **options)

    monkeypatch.setattr(SparseExperts, "_routed", watched)
    return shapes


@pytest.mark.slow
def test_a_mesh_divides_the_channels_of_each_expert(shapes):
    layer = mc.nn.Experts(4, 2, 6).build(3, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 3)), jnp.float32)
    wanted = nnx.jit(gradients_and_output)(layer, x)
    with jax.set_mesh(mc.sharding.make_mesh(dict(fsdp=2, tensor=2), devices=jax.devices()[:4])):
        got = nnx.jit(gradients_and_output)(layer, x)
    assert shapes == [(2, (4, 3, 6), (4, 6, 3)), (1, (4, 3, 3), (4, 3, 3))]
    for ours, one in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert_close(jax.device_get(ours), one, 1e-5)


@pytest.mark.parametrize("kind", first_kept(1, [AxisType.Explicit, AxisType.Auto]))
def test_a_hosts_axis_divides_the_experts_and_may_divide_rows_too(kind, shapes):
    def build():
        return mc.nn.Experts(4, 2, 6, 5).build(3, rngs=nnx.Rngs(0))

    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 3)), jnp.float32)
    wanted = nnx.jit(gradients_and_output)(build(), x)
    axes, devices = ("data", "expert"), jax.devices()[:4]
    mesh = jax.make_mesh((2, 2), axes, axis_types=(kind, kind), devices=devices)
    rules = (("batch", axes), ("experts", "expert"))
    with jax.set_mesh(mesh), logical_axis_rules(rules):
        layer = build()
        assert {shard.data.shape for shard in layer.gate[...].addressable_shards} == {(2, 3, 6)}
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(axes)))
        got = nnx.jit(gradients_and_output)(layer, x)
    assert shapes == [(4, (4, 3, 6), (4, 6, 3)), (2, (2, 3, 6), (2, 6, 3))]
    for ours, one in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert_close(jax.device_get(ours), one, 1e-5)


@pytest.mark.slow
def test_experts_are_chosen_by_groups_and_with_a_bias_of_their_own():
    experts = mc.nn.Experts(
        *(8, 3, 6),
        probabilities="sigmoid",
        scale=2.5,
        selection_bias=True,
        groups=4,
        top_groups=2,
    )
    layer = experts.build(3, rngs=nnx.Rngs(0))
    bias = jnp.asarray(np.random.default_rng(1).standard_normal(8), jnp.float32)
    layer.selection_bias.set_value(bias)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 20, 3)), jnp.float32)
    weights, chosen = map(np.asarray, layer._route(layer.router(x)[0]))
    for logits, got, among in zip(np.asarray(layer.router(x)[0]), weights, chosen, strict=True):
        scores = 1 / (1 + np.exp(-logits))
        by = (scores + bias).reshape(4, 2)
        groups = np.argsort(-by.sum(axis=1))[:2]
        best = [2 * group + i for group in groups for i in range(2)]
        best = sorted(best, key=lambda expert: -by.reshape(-1)[expert])[:3]
        assert sorted(among) == sorted(best)
        np.testing.assert_allclose(got, 2.5 * scores[among] / scores[among].sum(), rtol=1e-5)
    gradients = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    assert not np.any(gradients.selection_bias[...])
    assert np.any(gradients.router.kernel[...])


def test_more_experts_than_there_are():
    with pytest.raises(ValueError, match="top_k=5 exceeds the 4 experts"):
        mc.nn.Experts(4, 5, 6)
    with pytest.raises(ValueError, match="groups=3 must divide"):
        mc.nn.Experts(4, 2, 6, groups=3)
