"""The layers as Linen modules: in Linen's own loops and transformations, and against NNX."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, errors, nnx, serialization, traverse_util
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_sharding
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import memcache_jax as mc
from memcache_jax.nn.host_options import HostOptions
from tests.covers import first_kept, kept_of
from tests.nn.loops import FEATURES, HEADS, OPTIONS, VOCAB, cross_entropy, repeating_tokens

STREAMS = {
    "linear attention, grm": {
        "memory": mc.memories.LinearAttention(),
        "aggregation": mc.GRM(),
        "segmentation": mc.Constant(8),
    },
    "gated delta net, ssc, checkpoint": {
        "memory": mc.memories.GatedDeltaNet(),
        "aggregation": mc.SSC(top_k=1),
        "segmentation": mc.Constant(4),
        "start": "checkpoint",
    },
    "titans, grm, logarithmic": {
        "memory": mc.memories.Titans(chunk_size=4),
        "aggregation": mc.GRM(),
        "segmentation": mc.Logarithmic(4),
    },
    "linear attention, uniform soup": {  # whose cache is one running mean
        "memory": mc.memories.LinearAttention(),
        "aggregation": mc.Soup(gate="uniform"),
        "segmentation": mc.Constant(4),
    },
}
LAYERS: dict[str, Any] = {
    name: mc.nn.linen.MemoryCaching(None, 2, **STREAMS[name]) for name in STREAMS
}
LAYERS["attention"] = mc.nn.linen.Attention(num_heads=2)
LAYERS["attention, window"] = mc.nn.linen.Attention(num_heads=2, window=5)
ATTENTION, GRM, TITANS = (
    LAYERS[name] for name in ("attention", "linear attention, grm", "titans, grm, logarithmic")
)


def inputs(length=13, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, length, 8))


@functools.cache
def prepared(module):
    """The variables that ``init`` gives for a stream of 13 tokens, and the output of all."""
    stream = module.clone(decode=True)
    y, variables = jax.jit(stream.init_with_output)(jax.random.key(0), inputs())
    return variables, y


@functools.cache
def zeros(module):
    """The variables of such a stream, all zero."""
    stream = module.clone(decode=True)
    variables = jax.eval_shape(stream.init, jax.random.key(0), inputs())
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)


@functools.cache
def step(module):
    return jax.jit(functools.partial(module.apply, mutable=["cache"]))


def take(module, variables, x, **kwargs):
    """The next outputs of a stream, and the variables afterwards."""
    stream = module.clone(decode=True) if hasattr(module, "decode") else module
    y, changed = step(stream)(variables, x, **kwargs)
    return y, {**variables, **changed}


def shapes(variables):
    return jax.tree.map(jnp.shape, nn.meta.unbox(variables))


class LinenModel(nn.Module):
    """A Linen model with the layer inside."""

    name_of_options: str

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, FEATURES)(tokens)
        mixer = mc.nn.linen.MemoryCaching(FEATURES, HEADS, **OPTIONS[self.name_of_options])
        x = x + mixer(nn.RMSNorm()(x))
        return nn.Dense(VOCAB)(x)


@pytest.mark.parametrize("name", first_kept(1, [*OPTIONS]))
def test_linen_loop(name):
    model, tokens = LinenModel(name), repeating_tokens()
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))

    @jax.jit
    def train_step(state, tokens):
        def loss_fn(params):
            return cross_entropy(state.apply_fn({"params": params}, tokens), tokens)

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=gradients), loss

    losses = []
    for _ in range(30):
        state, loss = train_step(state, tokens)
        losses.append(float(loss))
    assert losses[0] > 0.8 * np.log(VOCAB)
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("name", first_kept(1, [*OPTIONS][::-1]))
def test_linen_and_nnx_forms_are_equal_for_equal_parameters(name):
    x = jax.random.normal(jax.random.key(1), (2, 21, FEATURES))
    linen = mc.nn.linen.MemoryCaching(FEATURES, HEADS, **OPTIONS[name])
    variables = nn.meta.unbox(jax.jit(linen.init)(jax.random.key(0), x))
    expected = jax.jit(linen.apply)(variables, x)

    layer = mc.nn.MemoryCaching(FEATURES, HEADS, **OPTIONS[name], rngs=nnx.Rngs(7))
    graph, state = nnx.split(layer, nnx.Param)
    apply = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    assert not np.allclose(apply(state, x), expected, atol=1e-3)
    flat = dict(nnx.to_flat_state(state))
    params = traverse_util.flatten_dict(variables["params"])
    assert {tuple(map(str, path)) for path in flat} == {tuple(map(str, path)) for path in params}
    for path, value in params.items():
        flat[path] = flat[path].replace(value)
    np.testing.assert_allclose(apply(nnx.from_flat_state(flat), x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["MemoryCaching", "Attention"])
def test_fields_are_the_arguments_of_the_nnx_layer(name):
    arguments = inspect.signature(getattr(mc.nn, name).__init__).parameters
    fields = {field.name: field for field in dataclasses.fields(getattr(mc.nn.linen, name))}
    options = {"decode", "max_length", "max_segments", "policy", "cache_dtype", "placement"}
    options |= {"rewind", "parent", "name", *HostOptions.__annotations__}
    fields = {name: fields[name] for name in fields.keys() - options}
    # Only the blocks of a LanguageModel have layers that read the states of others.
    assert fields.keys() == arguments.keys() - {"self", "rngs", "host", "states"}
    for name in fields.keys() - {"in_features", "num_heads"}:
        missing = arguments[name].default is inspect.Parameter.empty
        assert fields[name].default == (dataclasses.MISSING if missing else arguments[name].default)


@pytest.mark.slow
def test_initial_parameters_are_those_of_the_nnx_layer():
    params = nn.meta.unbox(prepared(GRM)[0])["params"]
    assert shapes(params) == {
        **{name: {"kernel": (8, 8)} for name in ("query", "key", "value", "connector", "out")},
        **{name: {"kernel": (4, 8)} for name in ("query_conv", "key_conv", "value_conv")},
        "output_gate": {"kernel": (8, 8)},
        "temperature": (2,),
        "norm": {"scale": (4,)},
    }
    assert params["temperature"].tolist() == [10.0] * 2
    for name in ("key", "connector"):
        np.testing.assert_array_equal(params[name]["kernel"], params["query"]["kernel"])
    assert not np.allclose(params["value"]["kernel"], params["query"]["kernel"])
    np.testing.assert_allclose(jnp.std(params["value"]["kernel"]), 8**-0.5, rtol=0.2)
    # Another seed, in a key of the old kind.
    other = nn.meta.unbox(jax.jit(GRM.init)(jax.random.PRNGKey(1), inputs()))["params"]
    assert not np.allclose(other["query"]["kernel"], params["query"]["kernel"])


class Model(nn.Module):
    mixer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.mixer(nn.RMSNorm()(x))


@pytest.mark.slow
def test_axes_have_logical_names():
    model = Model(TITANS.clone())
    specs = nn.get_partition_spec(jax.eval_shape(model.init, jax.random.key(0), inputs()))
    params = specs["params"]["mixer"]
    assert params["query"]["kernel"] == P("embed", "heads")
    assert params["out"]["kernel"] == P("heads", "embed")
    assert params["controls"]["eta"]["bias"] == P("heads")
    assert params["weights"]["W1"] == P("heads", None, "embed")
    assert params["norm"]["scale"] == P()

    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rules = (("embed", "x"), ("heads", "y"))
    shardings = logical_to_mesh_sharding(specs, mesh, rules)
    variables = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0), inputs())
    kernel = variables["params"]["mixer"]["query"]["kernel"].value
    assert kernel.sharding.spec == P("x", "y")
    expected = jax.jit(model.apply)(jax.device_get(variables), inputs())
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        y = jax.jit(model.apply)(variables, inputs())
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_axis_names_of_the_host():
    module = ATTENTION.clone(axis_names={"embed": "model", "heads": ("y", "z")})
    specs = nn.get_partition_spec(jax.eval_shape(module.init, jax.random.key(0), inputs()))
    assert specs["params"]["query"]["kernel"] == P("model", ("y", "z"))
    assert list(module.clone(in_features=8).init_cache(2, 13)) == ["max_length_13"]


@pytest.mark.slow
def test_boxed_and_unboxed_variables_give_the_same():
    boxed, full = prepared(GRM)
    plain = nn.meta.unbox(boxed)
    assert isinstance(boxed["params"]["out"]["kernel"], nn.LogicallyPartitioned)
    assert isinstance(plain["params"]["out"]["kernel"], jax.Array)
    assert jax.tree.structure(boxed["cache"]) == jax.tree.structure(plain["cache"])
    np.testing.assert_allclose(jax.jit(GRM.apply)(plain, inputs()), full, atol=1e-6)
    for variables in (boxed, plain, core.freeze(plain)):
        y, _ = take(GRM, variables, inputs()[:, :10])
        np.testing.assert_allclose(y, full[:, :10], atol=1e-5)


@pytest.mark.parametrize("name", kept_of([*LAYERS], "linear attention, grm", fast=["attention"]))
def test_stream_equals_the_full_pass(name):
    module = LAYERS[name]
    variables, full = prepared(module)
    # Models make empty caches of zeros, in the shapes that init would give.
    assert not any(x.any() for x in jax.tree.leaves(variables["cache"]))
    y, after = take(module, variables, inputs()[:, :10])
    assert shapes(after) == shapes(variables)
    np.testing.assert_allclose(y, full[:, :10], atol=1e-5)
    for i in range(10, 13):
        y, after = take(module, after, inputs()[:, i : i + 1])
        np.testing.assert_allclose(y, full[:, i : i + 1], atol=1e-5)


@pytest.mark.parametrize("name", kept_of([*LAYERS], "attention, window", *[*STREAMS][:1]))
def test_init_cache(name):
    module, (variables, _) = LAYERS[name], prepared(LAYERS[name])
    room = None if name == "attention, window" else 13
    cache = module.clone(in_features=8).init_cache(2, room)
    assert shapes(cache) == shapes(variables["cache"])
    assert all(x.shape[0] == 2 for x in jax.tree.leaves(cache))
    bound = module.clone(max_length=room).bind({"params": variables["params"]})
    of_bound = jax.eval_shape(functools.partial(bound.init_cache, 2))
    assert shapes(of_bound) == shapes(variables["cache"])
    with pytest.raises(ValueError, match="set in_features"):
        module.init_cache(2, room)


@pytest.mark.slow
def test_fields_bound_a_cache():
    recent = GRM.clone(max_segments=2, policy="drop_oldest", cache_dtype="bfloat16")
    variables, _ = prepared(recent)
    bank = variables["cache"]["max_length_None"]["memory"]["bank"]["0"]
    assert (bank.shape, bank.dtype) == ((2, 2, 2, 4, 4), jnp.bfloat16)
    y, variables = take(recent, variables, inputs(40)[:, :33])
    y, variables = take(recent, variables, inputs(40)[:, 33:])

    layer = recent.bind(variables).to_nnx()
    cache = layer.init_cache(2, max_segments=2, policy="drop_oldest", cache_dtype="bfloat16")
    expected, _ = jax.jit(layer.extend)(inputs(40), cache)
    np.testing.assert_allclose(y, expected[:, 33:], atol=1e-5)
    assert list(zeros(GRM.clone(max_length=24))["cache"]) == ["max_length_24"]


@pytest.mark.parametrize("module", first_kept(1, {"memory caching": GRM, "attention": ATTENTION}))
def test_ragged_rows(module):
    (variables, full), x = prepared(module), inputs()
    _, after = take(module, variables, x[:, :10], lengths=jnp.array([3, 9]))
    y, _ = take(module, after, jnp.stack([x[0, 3:4], x[1, 9:10]]))
    np.testing.assert_allclose(y, jnp.stack([full[0, 3:4], full[1, 9:10]]), atol=1e-5)


def test_rows_go_back():
    module = GRM.clone(rewind=4)
    (variables, full), x = prepared(module), inputs()
    _, after = take(module, variables, x[:, :10])
    stream, back = module.clone(decode=True), jnp.array([4, 1])
    _, changed = stream.apply(after, back, method="take_back", mutable=["cache"])
    y, _ = take(module, {**after, **changed}, jnp.stack([x[0, 6:7], x[1, 9:10]]))
    np.testing.assert_allclose(y, jnp.stack([full[0, 6:7], full[1, 9:10]]), atol=1e-5)
    with pytest.raises(ValueError, match=r"at most \[0, 3\] tokens, got \[1, 0\]"):
        stream.apply({**after, **changed}, 1 - back % 2, method="take_back", mutable=["cache"])


def test_rows_of_a_cache_are_gathered():
    # As beam search does, in all arrays alike.
    (variables, full), x = prepared(GRM), inputs()
    _, after = take(GRM, variables, x[:, :10])
    swapped = jax.tree.map(lambda x: x[::-1], after["cache"])
    y, _ = take(GRM, {**after, "cache": swapped}, x[::-1, 10:11])
    np.testing.assert_allclose(y[::-1], full[:, 10:11], atol=1e-5)


def test_variables_are_saved_and_restored():
    (variables, full), x = prepared(GRM), inputs()
    _, after = take(GRM, variables, x[:, :10])
    saved = serialization.to_bytes(after)
    for restored in (
        serialization.from_bytes(variables, saved),
        serialization.msgpack_restore(serialization.to_bytes(nn.meta.unbox(after))),
    ):
        y, _ = take(GRM, restored, x[:, 10:11])
        np.testing.assert_allclose(y, full[:, 10:11], atol=1e-5)


def test_packed_documents():
    variables, full = prepared(ATTENTION)
    documents = jnp.array([[0] * 5 + [1] * 8, [2] * 13])
    y = jax.jit(ATTENTION.apply)(variables, inputs(), documents)
    np.testing.assert_allclose(y[1], full[1], atol=1e-6)
    alone = jax.jit(ATTENTION.apply)(variables, inputs()[:1, 5:])
    np.testing.assert_allclose(y[0, 5:], alone[0], atol=1e-5)
    again = jax.jit(ATTENTION.apply)(variables, inputs(), document_ids=documents)
    np.testing.assert_array_equal(again, y)


@pytest.mark.slow
def test_in_the_place_of_attention():
    x, mask = inputs(), nn.make_causal_mask(jnp.ones((2, 13)))
    init = nn.with_logical_partitioning(nn.initializers.ones, ("host", None))
    module = mc.nn.linen.Attention(
        num_heads=2, qkv_features=8, kernel_init=init, use_bias=True, deterministic=True
    )

    @jax.jit
    def run(variables, x):
        call: dict[str, Any] = dict(mask=mask, dropout_rng=None, deterministic=True)
        return module.apply(variables, x, x, **call), module.apply(variables, inputs_q=x)

    variables: Any = module.init(jax.random.key(0), x)
    kernel = variables["params"]["query"]["kernel"]
    assert kernel.names == ("embed", "heads")
    assert (kernel.value == 1).all()
    assert variables["params"]["out"]["bias"].value.shape == (8,)
    np.testing.assert_allclose(*run(variables, x), atol=1e-6)
    # And what takes its place in a stream.
    variables, full = prepared(GRM)
    _, variables = take(GRM, variables, x[:, :10])
    y, _ = take(GRM, variables, x[:, 10:11], positions=jnp.array([10]), deterministic=True)
    np.testing.assert_allclose(y, full[:, 10:11], atol=1e-5)


class Block(nn.Module):
    mixer: nn.Module

    def setup(self):
        self.norm, self.mix = nn.RMSNorm(), self.mixer.clone()

    def __call__(self, x, _):
        return x + self.mix(self.norm(x)), None


class Stack(nn.Module):
    mixer: nn.Module
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return block(self.mixer.clone(), name="layers")(x, None)[0]


@pytest.mark.parametrize(
    ("name", "remat"),
    first_kept(1, [("attention", True), ("gated delta net, ssc, checkpoint", False)]),
)
def test_scan_over_layers(name, remat):
    whole = Stack(LAYERS[name].clone(), remat)
    stream = Stack(LAYERS[name].clone(decode=True), remat)
    full, variables = jax.jit(stream.init_with_output)(jax.random.key(0), inputs())
    kernel = variables["params"]["layers"]["mix"]["query"]["kernel"]
    assert kernel.names == ("layers", "embed", "heads")
    assert kernel.value.shape == (2, 8, 8)
    assert not np.allclose(kernel.value[0], kernel.value[1])

    def one_by_one(params, x):
        for i in range(2):
            layer = jax.tree.map(lambda x, i=i: x[i], nn.meta.unbox(params))
            x, _ = Block(LAYERS[name].clone()).apply({"params": layer}, x, None)
        return x

    expected = jax.jit(one_by_one)(variables["params"]["layers"], inputs())
    np.testing.assert_allclose(full, expected, atol=1e-5)
    y, after = take(stream, variables, inputs()[:, :12])
    np.testing.assert_allclose(y, full[:, :12], atol=1e-5)
    y, _ = take(stream, after, inputs()[:, 12:])
    np.testing.assert_allclose(y, full[:, 12:], atol=1e-5)

    def loss(params):
        y: Any = whole.apply({"params": params}, inputs())
        return (y**2).sum()

    kernel = jax.jit(jax.grad(loss))(variables["params"])["layers"]["mix"]["value"]["kernel"]
    assert (abs(kernel.value).max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize("transform", first_kept(1, dict(remat=nn.remat, jit=nn.jit)))
def test_transformed_class(transform):
    variables, full = prepared(GRM)
    transformed = transform(mc.nn.linen.MemoryCaching)
    module = transformed(8, 2, **STREAMS["linear attention, grm"], decode=True)
    assert shapes(jax.eval_shape(module.init, jax.random.key(0), inputs())) == shapes(variables)
    y, _ = take(module, variables, inputs()[:, :10])
    np.testing.assert_allclose(y, full[:, :10], atol=1e-5)


def test_tabulate_counts_every_parameter():
    count = sum(x.size for x in jax.tree.leaves(prepared(GRM)[0]["params"]))
    table = GRM.tabulate(jax.random.key(0), inputs(), console_kwargs={"width": 200})
    assert f"Total Parameters: {count}" in table
    assert "temperature" in table


def test_the_nnx_layer_of_a_bound_module():
    variables, _ = prepared(GRM)
    layer = GRM.bind(variables).to_nnx()
    assert jax.eval_shape(layer.gates, inputs()).shape == (2, 13, 2, 2)
    np.testing.assert_array_equal(
        layer.query.kernel[...], variables["params"]["query"]["kernel"].value
    )


class TestErrors:
    def test_arguments(self):
        with pytest.raises(ValueError, match="num_heads must be given"):
            mc.nn.linen.Attention(8).init(jax.random.key(0), inputs())
        with pytest.raises(ValueError, match="must divide"):
            mc.nn.linen.Attention(8, 3).init(jax.random.key(0), inputs())
        with pytest.raises(ValueError, match="it has no dropout"):
            mc.nn.linen.Attention(8, 2, dropout_rate=0.1).init(jax.random.key(0), inputs())

    def test_call(self):
        variables = zeros(GRM)
        with pytest.raises(ValueError, match=r"must be \(b, t, d\), got shape \(13, 8\)"):
            GRM.apply(variables, inputs()[0])
        with pytest.raises(ValueError, match="got them with decode=False"):
            GRM.apply(variables, inputs(), lengths=jnp.array([1, 2]))
        with pytest.raises(errors.ScopeParamShapeError):
            GRM.apply(variables, inputs()[..., :4])

    @pytest.mark.parametrize("module", [GRM, ATTENTION], ids=["memory caching", "attention"])
    def test_full_cache(self, module):
        variables, _ = prepared(module)
        _, full = take(module, variables, inputs(10))
        for _ in range(3):
            _, full = take(module, full, inputs(1))
        stream = module.clone(decode=True)
        with pytest.raises(ValueError, match="holds 13 tokens in a row and would have 14"):
            stream.apply(full, inputs(1), mutable=["cache"])
        y, _ = take(module, full, inputs(1))
        assert jnp.isnan(y).all()

    @pytest.mark.parametrize("module", [GRM, ATTENTION], ids=["memory caching", "attention"])
    def test_cache(self, module):
        variables = zeros(module)
        stream = functools.partial(module.clone(decode=True).apply, mutable=["cache"])
        with pytest.raises(errors.ModifyScopeVariableError):
            jax.jit(module.clone(decode=True).apply)(variables, inputs())
        with pytest.raises(ValueError, match="got none: give variables"):
            stream({"params": variables["params"]}, inputs())
        with pytest.raises(ValueError, match=r"\['a', 'b'\]: give variables"):
            stream({**variables, "cache": {"b": 1, "a": 2}}, inputs())
        with pytest.raises(ValueError, match="but this layer and its input need"):
            stream(variables, inputs(batch=3))

    def test_documents_in_a_stream(self):
        stream = functools.partial(GRM.clone(decode=True).apply, mutable=["cache"])
        documents, variables = jnp.zeros((2, 13), int), zeros(GRM)
        with pytest.raises(ValueError, match="give no document_ids"):
            stream(variables, inputs(), documents)
        with pytest.raises(ValueError, match="give nothing but the input"):
            stream(variables, inputs(), documents, lengths=jnp.array([1, 2]))

    def test_cache_of_another_layer(self):
        variables = zeros(GRM)
        small = GRM.clone(decode=True, segmentation=mc.Constant(2))
        with pytest.raises(ValueError, match="but this layer and its input need"):
            small.apply(variables, inputs(), mutable=["cache"])
        cache = zeros(ATTENTION)["cache"]
        with pytest.raises(ValueError, match="the cache's arrays must be"):
            small.apply({**variables, "cache": cache}, inputs(), mutable=["cache"])

    def test_parameters_of_another_layer(self):
        variables = zeros(GRM.clone(memory=mc.memories.SSD()))
        other = GRM.clone(memory=mc.memories.GatedDeltaNet())
        with pytest.raises(ValueError, match=r"beta/kernel'\]; unknown: \['controls/lam/b"):
            other.apply(variables, inputs())
        params = {n: x for n, x in variables["params"].items() if n != "temperature"}
        with pytest.raises(errors.ScopeParamNotFoundError, match="temperature"):
            GRM.apply({"params": params}, inputs())
