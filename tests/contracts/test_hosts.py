"""Small models in the manner of other people's, with our layers in them, on eight devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memcache_jax as mc

pytestmark = pytest.mark.slow

FEATURES, VOCAB, LENGTH, STEPS = 16, 16, 12, 3
MEMORY: Any = dict(
    memory=mc.memories.GatedDeltaNet(), aggregation=mc.GRM(), segmentation=mc.Constant(4)
)
RULES = (("batch", "fsdp"), ("embed", "fsdp"), ("heads", "tp"), ("vocab", None), ("layers", None))
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (8, LENGTH + 1)).astype(np.int32)
SEGMENTS = np.sort(np.random.default_rng(1).integers(1, 4, (8, LENGTH)).astype(np.int32), axis=1)


def spec_of(x: Any):
    return x.sharding.spec


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)


class Decoder(nnx.Module):
    """As Flax's examples: Flax's own layers, and one line that is ours."""

    def __init__(self, rngs, axis_names=None):
        self.embed = nnx.Embed(VOCAB, FEATURES, rngs=rngs)
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.attn = mc.nn.MemoryCaching(FEATURES, 4, **MEMORY, axis_names=axis_names, rngs=rngs)
        self.head = nnx.Linear(FEATURES, VOCAB, rngs=rngs)

    def __call__(self, tokens, segment_ids, sharding=None):
        out = dict(out_sharding=sharding) if sharding is not None else {}
        x = self.embed(tokens, **out)
        x = x + self.attn(self.norm(x), segment_ids=segment_ids, deterministic=True)
        self.sow(nnx.Intermediate, "mixed", x)
        return self.head(x)


def train_step(model, optimizer, tokens, targets, segments, sharding):
    def loss_fn(model):
        forward = nnx.capture(lambda model: model(tokens, segments, sharding), nnx.Intermediate)
        logits, captured = forward(model)
        of_token = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return of_token.mean(), captured

    (loss, captured), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients)
    return loss, captured


def losses_of(model, optimizer, rows=lambda x: x, sharding=None):
    tokens, targets = rows(TOKENS[:, :-1]), rows(TOKENS[:, 1:])
    step: Any = nnx.jit(functools.partial(train_step, sharding=sharding))
    losses, captured = [], {}
    for _ in range(STEPS):
        loss, captured = step(model, optimizer, tokens, targets, rows(SEGMENTS))
        losses.append(float(loss))
    (mixed,) = captured["mixed"].get_value()
    assert mixed.shape == (8, LENGTH, FEATURES)
    return losses, mixed


@pytest.fixture(scope="module")
def wanted():
    model = Decoder(nnx.Rngs(0))
    losses, _ = losses_of(model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param))
    assert losses[-1] < losses[0]
    return losses


def test_explicit_axes_with_captures(wanted):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        model = Decoder(nnx.Rngs(0), axis_names=dict(embed="fsdp", heads="tp"))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        rows = NamedSharding(mesh, P("fsdp"))
        losses, mixed = losses_of(model, optimizer, lambda x: jax.device_put(x, rows), rows)
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    assert spec_of(mixed) == P("fsdp", None, None)
    assert spec_of(model.attn.query.kernel[...]) == P("fsdp", "tp")


def test_logical_rules(wanted):
    """As Flax's guide to several devices creates a model."""
    mesh = mesh_of(AxisType.Auto)

    @nnx.jit
    def create():
        model = Decoder(nnx.Rngs(0))
        state = nnx.state(model)
        laid = jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))
        nnx.update(model, laid)
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    with jax.set_mesh(mesh), logical_axis_rules(RULES):
        model, optimizer = create()
        assert spec_of(model.attn.query.kernel[...]) == P("fsdp", "tp")
        rows = NamedSharding(mesh, P("fsdp"))
        losses, _ = losses_of(model, optimizer, lambda x: jax.device_put(x, rows))
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)


class LinenBlock(linen.Module):
    decode: bool = False

    @linen.compact
    def __call__(self, x, _):
        mixer = mc.nn.linen.MemoryCaching(num_heads=4, **MEMORY, decode=self.decode, name="attn")
        return x + mixer(linen.RMSNorm()(x)), None


class LinenDecoder(linen.Module):
    """As Flax's Linen examples: a rematerialised block, scanned, and a cache to decode with."""

    decode: bool = False

    @linen.compact
    def __call__(self, tokens):
        init = linen.with_logical_partitioning(jax.nn.initializers.normal(1.0), ("vocab", "embed"))
        table: Any = self.param("embed", init, (VOCAB, FEATURES))
        stack = linen.scan(
            linen.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={linen.PARTITION_NAME: "layers"},
        )
        x, _ = stack(self.decode)(jnp.take(table, tokens, axis=0), None)
        return x @ table.T


def test_linen_with_rules_scan_remat_and_a_cache():
    model: Any = LinenDecoder()
    mesh = mesh_of(AxisType.Auto)
    tokens, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    boxed = jax.jit(model.init)(jax.random.key(0), tokens)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, tokens, targets):
        def loss_fn(params):
            logits: Any = model.apply({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    def losses_of(params, *rows):
        state, losses = optimizer.init(params), []
        for _ in range(STEPS):
            params, state, loss = step(params, state, *rows)
            losses.append(float(loss))
        return losses

    params = linen.meta.unbox(boxed)["params"]
    wanted = losses_of(params, tokens, targets)
    assert wanted[-1] < wanted[0]
    specs = linen.get_partition_spec(boxed)
    shardings = linen.spmd.logical_to_mesh_sharding(specs, mesh, RULES)["params"]
    (block,) = (layout for name, layout in shardings.items() if name != "embed")
    assert block["attn"]["query"]["kernel"].spec == P(None, "fsdp", "tp")
    with jax.set_mesh(mesh), linen.logical_axis_rules(RULES):
        laid = jax.device_put(params, shardings)
        rows = jax.device_put((tokens, targets), NamedSharding(mesh, P("fsdp")))
        np.testing.assert_allclose(losses_of(laid, *rows), wanted, rtol=1e-4)

    whole: Any = jax.jit(model.apply)({"params": params}, tokens)
    stream = LinenDecoder(decode=True)
    cache = jax.jit(stream.init)(jax.random.key(0), tokens)["cache"]

    @jax.jit
    def decode(cache, piece):
        variables = {"params": params, "cache": cache}
        return stream.apply(variables, piece, mutable=["cache"])

    for begin, end in ((0, 5), (5, 6), (6, 11)):
        logits, changed = decode(cache, tokens[:, begin:end])
        cache = changed["cache"]
        np.testing.assert_allclose(logits, whole[:, begin:end], atol=2e-5)
