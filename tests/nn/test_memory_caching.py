"""The layer: causal, any length, its precision, its errors, a training loop that is not ours."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memcache_jax as mc
from tests.cases import COVER, MEMORIES, assert_close
from tests.covers import first_kept, kept_of, rules
from tests.nn.caches import LAYERS, LENGTH, caching, inputs, stream
from tests.nn.layer import call, make, randomized, tokens
from tests.nn.loops import FEATURES, HEADS, OPTIONS, VOCAB, cross_entropy, repeating_tokens


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("memory", "aggregation", "start"),
    first_kept(
        2,
        [
            ("titans", "soup", "checkpoint"),
            ("rwkv7", "residual", "independent"),
            ("linear", "grm", "independent"),
            ("gated_deltanet", "ssc", "checkpoint"),
        ],
    ),
)
def test_layer_is_causal_and_prefix_consistent(memory, aggregation, start):
    layer = randomized(make(memory, aggregation, start=start))
    x = tokens(21, dtype=jnp.float64)
    y = call(layer, x)
    changed = call(layer, x.at[:, 13:].add(1.0))
    assert_close(changed[:, :13], y[:, :13], 1e-13)
    assert jnp.abs(changed[:, 13:] - y[:, 13:]).max(axis=(0, 2)).min() > 1e-6
    assert_close(call(layer, x[:, :13]), y[:, :13], 1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", rules(2, "linear", among=COVER))
def test_every_parameter_has_a_gradient(memory):
    layer, x = randomized(make(memory)), tokens(21, dtype=jnp.float64)
    graph, params = nnx.split(layer)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(x) ** 2)))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        if memory == "vector" and "query" in name:
            continue  # which such a memory is blind to
        assert float(jnp.abs(leaf).max()) > 1e-9, name


@pytest.mark.slow
def test_soup_is_not_grm_before_any_training():
    x = tokens(21)
    soup, grm = (call(make(aggregation=aggregation), x) for aggregation in ("soup", "grm"))
    assert_close(soup[:, :8], grm[:, :8], 1e-5)
    assert jnp.abs(soup[:, 8:] - grm[:, 8:]).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_inputs_keep_float32_parameters_and_return_bfloat16():
    layer = make(dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(layer)))
    x = tokens(21)
    y = call(layer, x)
    assert y.dtype == jnp.bfloat16
    # The projections round at every product; no state or gate does.
    assert_close(y.astype(jnp.float32), call(make(), x), 3e-2)


@pytest.mark.slow
def test_reference_implementation_gives_the_same_layer():
    x = tokens(13)
    assert_close(call(make(implementation="reference"), x), call(make(), x), 1e-5)


@pytest.mark.slow
def test_head_dim_need_not_divide_the_features():
    layer = make(head_dim=12)
    assert call(layer, tokens(9)).shape == (2, 9, 16)
    assert layer.out.kernel.shape == (24, 16)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), "num_heads=3 must divide in_features=16"),
        (dict(segmentation=mc.Constant(6)), "chunk size of Titans, 4, must divide"),
        (dict(num_heads=0), "num_heads must be at least 1, got 0"),
        (dict(head_dim=0), "head_dim must be at least 1, got 0"),
        (dict(implementation="cuda"), r"implementation must be one of .* got 'cuda'"),
        (dict(aggregation=mc.GRM), "aggregation must be an object such as"),
        (dict(start="continue"), r"start must be one of .* got 'continue'"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    options = (
        dict(num_heads=2, segmentation=mc.Constant(8), aggregation=mc.GRM(), rngs=nnx.Rngs(0))
        | options
    )
    with pytest.raises(ValueError, match=message):
        mc.nn.MemoryCaching(16, memory=MEMORIES["titans"], **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 15)])
@pytest.mark.parametrize("build", [make, lambda: mc.nn.Attention(16, 2, rngs=nnx.Rngs(0))])
def test_input_of_another_shape(build, shape):
    with pytest.raises(ValueError, match=r"must be \(b, t, d\) with d = in_features = 16"):
        build()(jnp.zeros(shape))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("aggregation", "segmentation"),
    first_kept(
        2,
        [
            ("grm", mc.Logarithmic(4)),
            ("ssc", mc.Constant(8)),
            ("residual", mc.Constant(8)),
            ("grm", mc.Constant(64)),
        ],
    ),
    ids=str,
)
def test_gates_are_those_of_the_reads(aggregation, segmentation):
    layer = randomized(make("linear", aggregation, segmentation=segmentation))
    length = 45

    @jax.jit
    def run(layer, x):
        rows = layer.operands(x)
        options: Any = dict(aggregation=layer.aggregation, segmentation=segmentation)
        y = mc.memory_caching(**rows, memory=layer.memory, **options)
        return layer.gates(x), rows, y

    gates, rows, wanted = run(layer, tokens(length, dtype=jnp.float64))

    # A linear memory returns the sum of the values that it holds, each by its key's match.
    plan, at = segmentation.plan(length), np.arange(length)
    begin, end = plan.block_size * plan.buckets.T[..., None]
    held = ((begin <= at) & (at < end)).astype(float)
    live_begin = plan.first[at // plan.block_size] * plan.block_size
    live = np.tri(length) * (at >= live_begin[:, None])
    weight = jnp.einsum("bths,sj->bhtj", gates[..., :-1], held)
    weight += jnp.einsum("bth,tj->bhtj", gates[..., -1], live)
    match = jnp.einsum("bthk,bjhk->bhtj", rows["query"], rows["key"])
    assert_close(jnp.einsum("bhtj,bhtj,bjhv->bthv", match, weight, rows["value"]), wanted, 1e-12)


class Attention(nnx.Module):
    """What a user has: causal attention by Flax."""

    def __init__(self, features, num_heads, *, rngs):
        self.attention = nnx.MultiHeadAttention(
            num_heads, features, decode=False, use_bias=False, rngs=rngs
        )

    def __call__(self, x):
        return self.attention(x, mask=nnx.make_causal_mask(x[..., 0]))


class Model(nnx.Module):
    def __init__(self, mixer, *, rngs):
        self.embed = nnx.Embed(VOCAB, FEATURES, rngs=rngs)
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.mixer = mixer
        self.head = nnx.Linear(FEATURES, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.mixer(self.norm(x)))


@pytest.mark.parametrize("name", first_kept(2, ["attention", *OPTIONS]))
def test_nnx_loop(name):
    rngs = nnx.Rngs(0)
    if name == "attention":
        mixer = Attention(FEATURES, HEADS, rngs=rngs)
    else:
        mixer = mc.nn.MemoryCaching(FEATURES, HEADS, **OPTIONS[name], rngs=rngs)
    model = Model(mixer, rngs=rngs)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, tokens):
        loss, gradients = nnx.value_and_grad(lambda m: cross_entropy(m(tokens), tokens))(model)
        optimizer.update(model, gradients)
        return loss

    tokens = repeating_tokens()
    losses = [float(train_step(model, optimizer, tokens)) for _ in range(30)]
    assert losses[0] > 0.8 * np.log(VOCAB)
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("name", kept_of([*LAYERS], "grm", "position", "window"))
def test_layer(name):
    layer, x = LAYERS[name](nnx.Rngs(0)), inputs()
    graph, state = nnx.split(layer)
    step = jax.jit(
        lambda x, cache, lengths: nnx.merge(graph, state).extend(x, cache, lengths),
        donate_argnums=1,
    )
    y, _ = stream(step, x, layer.init_cache(3, LENGTH), 3)
    assert_close(y, nnx.jit(lambda layer, x: layer(x))(layer, x), 2e-5)


@pytest.mark.usefixtures("every_platform")
@pytest.mark.slow
def test_call_with_a_cache():
    layer = caching(nnx.Rngs(0), mc.memories.LinearAttention(), mc.GRM())
    x, outputs = inputs(), []
    cache: Any = layer.init_cache(3, max_length=LENGTH)
    step = nnx.jit(lambda layer, x, cache: layer(x, cache=cache))
    for begin, end in ((0, 30), (30, LENGTH)):
        y, cache = step(layer, x[:, begin:end], cache)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), call(layer, x), 2e-5)
    assert cache.nbytes == sum(a.nbytes for a in jax.tree.leaves(cache))
    with pytest.raises(ValueError, match="give no document_ids"):
        layer(x, jnp.zeros(x.shape[:2], int), cache=cache)


@pytest.mark.slow
def test_initial_weights_are_trained_where_the_cache_is_a_constant():
    layer = caching(nnx.Rngs(0), mc.memories.Titans(chunk_size=2, depth=1), mc.Residual())

    @nnx.jit
    def gradients(layer, x, cache):
        def loss(layer):
            y, after = layer.extend(x, cache)
            return (y**2).sum(), after

        return nnx.grad(loss, has_aux=True)(layer)

    # Segments have 8 tokens: the first piece begins one and the third one does, not the second.
    cache, seen = layer.init_cache(1, 9), []
    for begin in (0, 3, 6):
        slopes, cache = gradients(layer, inputs(1)[:, begin : begin + 3], cache)
        seen.append(bool(jnp.any(slopes.weights.W[...])))
    assert seen == [True, False, True]
