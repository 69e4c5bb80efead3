"""The layers as Linen modules: in Linen's own loops and transformations, and against NNX."""

import dataclasses
import inspect

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, traverse_util
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec

import memcache_jax as mc
from tests.nn.loops import FEATURES, HEADS, OPTIONS, VOCAB, cross_entropy, repeating_tokens

GATED = OPTIONS["titans, grm"]
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
    "titans, grm, logarithmic": GATED | {"segmentation": mc.Logarithmic(4)},
    "linear attention, uniform soup": {
        "memory": mc.memories.LinearAttention(),
        "aggregation": mc.Soup(gate="uniform"),
        "segmentation": mc.Constant(4),
    },
}
LAYERS = {name: mc.nn.linen.MemoryCaching(None, HEADS, **STREAMS[name]) for name in STREAMS}
LAYERS["attention"] = mc.nn.linen.Attention(num_heads=HEADS)
LAYERS["attention, window"] = mc.nn.linen.Attention(num_heads=HEADS, window=5)
PLAIN, GRM = LAYERS["attention"], LAYERS["linear attention, grm"]


def inputs(length=13, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, length, FEATURES))


def shapes(variables):
    return jax.tree.map(jnp.shape, nn.meta.unbox(variables))


def stream(module, variables, x, lengths, jit=True):
    """Outputs of pieces of these lengths, and the variables afterwards."""

    def step(variables, x):
        return module.apply(variables, x, mutable=["cache"])

    step = jax.jit(step) if jit else step
    outputs, begin = [], 0
    for length in lengths:
        y, changed = step(variables, x[:, begin : begin + length])
        variables, begin = {**variables, **changed}, begin + length
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), variables


class LinenModel(nn.Module):
    """A Linen model with the layer inside."""

    name_of_options: str

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, FEATURES)(tokens)
        mixer = mc.nn.linen.MemoryCaching(FEATURES, HEADS, **OPTIONS[self.name_of_options])
        x = x + mixer(nn.RMSNorm()(x))
        return nn.Dense(VOCAB)(x)


@pytest.mark.parametrize("name", OPTIONS)
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


@pytest.mark.parametrize("name", OPTIONS)
def test_linen_and_nnx_forms_are_equal_for_equal_parameters(name):
    x = inputs(21)
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
    fields = {name: fields[name] for name in fields.keys() - options - {"parent", "name"}}
    assert fields.keys() == arguments.keys() - {"self", "rngs"}
    for name in fields.keys() - {"in_features", "num_heads"}:
        missing = arguments[name].default is inspect.Parameter.empty
        assert fields[name].default is (dataclasses.MISSING if missing else arguments[name].default)


def test_initial_parameters_are_those_of_the_nnx_layer():
    variables = nn.meta.unbox(LAYERS["linear attention, grm"].init(jax.random.key(0), inputs()))
    params = variables["params"]
    assert set(params) == {
        *("query", "key", "value", "query_conv", "key_conv", "value_conv"),
        *("connector", "temperature", "norm", "output_gate", "out"),
    }
    assert params["query"]["kernel"].shape == (FEATURES, FEATURES)
    assert params["temperature"].tolist() == [10.0] * HEADS
    assert params["norm"]["scale"].shape == (FEATURES // HEADS,)
    for name in ("key", "connector"):
        np.testing.assert_array_equal(params[name]["kernel"], params["query"]["kernel"])
    assert not np.allclose(params["value"]["kernel"], params["query"]["kernel"])
    np.testing.assert_allclose(jnp.std(params["value"]["kernel"]), FEATURES**-0.5, rtol=0.1)
    # A key of the old kind, and another seed.
    other = nn.meta.unbox(GRM.init(jax.random.PRNGKey(1), inputs()))["params"]
    assert not np.allclose(other["query"]["kernel"], params["query"]["kernel"])


def test_axis_names_are_logical():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mc.nn.linen.MemoryCaching(num_heads=HEADS, **GATED, name="mixer")(x)

    specs = nn.get_partition_spec(jax.eval_shape(Model().init, jax.random.key(0), inputs()))
    params = specs["params"]["mixer"]
    assert params["query"]["kernel"] == PartitionSpec("embed", "heads")
    assert params["out"]["kernel"] == PartitionSpec("heads", "embed")
    assert params["controls"]["eta"]["bias"] == PartitionSpec("heads")
    assert params["weights"]["W1"] == PartitionSpec("heads", None, "embed")
    assert params["norm"]["scale"] == PartitionSpec()

    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("embed", "x"), ("heads", "y"))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
    x = inputs()
    variables = jax.jit(Model().init, out_shardings=shardings)(jax.random.key(0), x)
    kernel = variables["params"]["mixer"]["query"]["kernel"].value
    assert kernel.sharding.spec == PartitionSpec("x", "y")
    expected = Model().apply(jax.device_get(variables), x)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        y = jax.jit(Model().apply)(variables, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_boxed_and_unboxed_variables_give_the_same():
    x = inputs()
    module = LAYERS["gated delta net, ssc, checkpoint"].clone(decode=True)
    variables = module.init(jax.random.key(0), x)
    plain = nn.meta.unbox(variables)
    assert any(isinstance(x, nn.LogicallyPartitioned) for x in variables["params"]["out"].values())
    assert not any(isinstance(x, nn.LogicallyPartitioned) for x in plain["params"]["out"].values())
    assert jax.tree.structure(variables["cache"]) == jax.tree.structure(plain["cache"])
    for mode in (variables, plain, flax.core.freeze(variables)):
        y, _ = module.apply(mode, x, mutable=["cache"])
        full = module.clone(decode=False).apply(mode, x)
        np.testing.assert_allclose(y, full, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_stream_equals_the_full_pass(name):
    x, module = inputs(21), LAYERS[name].clone(decode=True)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    full = jax.jit(LAYERS[name].apply)({"params": variables["params"]}, x)
    np.testing.assert_allclose(y, full, atol=1e-6)
    y, after = stream(module, variables, x, [11, 7, 1, 1, 1])
    np.testing.assert_allclose(y, full, atol=1e-5)
    assert shapes(after) == shapes(variables)


@pytest.mark.parametrize("name", LAYERS)
def test_zeros_are_an_empty_cache(name):
    # As models make one: of the shapes that init would give.
    x, module = inputs(), LAYERS[name].clone(decode=True)
    variables = module.init(jax.random.key(0), x)
    full = LAYERS[name].apply(variables, x)
    cache = jax.eval_shape(module.init, jax.random.key(0), x)["cache"]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    y, _ = module.apply({**variables, "cache": zeros}, x, mutable=["cache"])
    np.testing.assert_allclose(y, full, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_init_cache(name):
    x, module = inputs(), LAYERS[name].clone(decode=True)
    variables = module.init(jax.random.key(0), x)
    room = None if name == "attention, window" else x.shape[1]
    for cache in (
        module.clone(in_features=FEATURES).init_cache(2, room),
        module.bind(variables).init_cache(2, room),
        module.bind({"params": variables["params"]}).clone(max_length=room).init_cache(2),
    ):
        assert shapes(cache) == shapes(variables["cache"])
    assert all(x.shape[0] == 2 for x in jax.tree.leaves(cache))
    with pytest.raises(ValueError, match="in_features"):
        module.init_cache(2, room)


def test_fields_bound_a_cache():
    x = inputs(40)
    recent = GRM.clone(decode=True, max_segments=2, policy="drop_oldest", cache_dtype="bfloat16")
    variables = recent.init(jax.random.key(0), x[:, :1])  # of any length
    bank = variables["cache"]["max_length_None"]["memory"]["bank"]
    assert {x.dtype.name for x in jax.tree.leaves(bank)} == {"bfloat16"}
    assert {x.shape[2] for x in jax.tree.leaves(bank)} == {2}
    y, _ = stream(recent, variables, x, [17, 23])
    layer = recent.bind(variables).to_nnx()
    cache = layer.init_cache(2, max_segments=2, policy="drop_oldest", cache_dtype="bfloat16")
    expected, _ = layer(x, cache=cache)
    np.testing.assert_allclose(y, expected, atol=1e-5)

    longer = GRM.clone(decode=True, max_length=24)
    variables = longer.init(jax.random.key(0), x[:, :1])
    assert list(variables["cache"]) == ["max_length_24"]


def test_ragged_rows():
    x, module = inputs(), GRM.clone(decode=True)
    variables = module.init(jax.random.key(0), x)
    lengths = jnp.array([3, 6])
    _, changed = module.apply(variables, x[:, :6], lengths=lengths, mutable=["cache"])
    rest = jnp.stack([x[0, 3:10], x[1, 6:13]])
    y, _ = module.apply({**variables, **changed}, rest, mutable=["cache"])
    full = GRM.apply(variables, x)
    np.testing.assert_allclose(y[0], full[0, 3:10], atol=1e-5)
    np.testing.assert_allclose(y[1], full[1, 6:13], atol=1e-5)


def test_rows_of_a_cache_can_be_gathered():
    # As beam search does, on every array.
    x, module = inputs(), GRM.clone(decode=True)
    variables = module.init(jax.random.key(0), x)
    _, changed = module.apply(variables, x[:, :10], mutable=["cache"])
    swapped = jax.tree.map(lambda x: x[jnp.array([1, 0])], changed)
    y, _ = module.apply({**variables, **swapped}, x[::-1, 10:], mutable=["cache"])
    np.testing.assert_allclose(y[::-1], GRM.apply(variables, x)[:, 10:], atol=1e-5)


def test_a_cache_is_saved_and_restored():
    x, module = inputs(), LAYERS["titans, grm, logarithmic"].clone(decode=True)
    variables = module.init(jax.random.key(0), x)
    full = module.clone(decode=False).apply(variables, x)
    _, changed = module.apply(variables, x[:, :10], mutable=["cache"])
    saved = flax.serialization.to_bytes(changed)
    for restored in (
        flax.serialization.from_bytes(variables["cache"] | changed, saved),
        flax.serialization.msgpack_restore(saved),
    ):
        y, _ = module.apply({**variables, "cache": restored["cache"]}, x[:, 10:], mutable=["cache"])
        np.testing.assert_allclose(y, full[:, 10:], atol=1e-5)


def test_packed_documents():
    x = inputs()
    documents = jnp.array([[0] * 5 + [1] * 8, [2] * 13])
    variables = GRM.init(jax.random.key(0), x)
    y = GRM.apply(variables, x, documents)
    np.testing.assert_allclose(y[0, 5:], GRM.apply(variables, x[:1, 5:])[0], atol=1e-5)
    np.testing.assert_array_equal(y, GRM.apply(variables, x, document_ids=documents))


class Stack(nn.Module):
    """Layers under a scan, as ``setup`` or ``compact`` makes them."""

    mixer: nn.Module
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            mixer: nn.Module

            def setup(self):
                self.norm, self.mix = nn.RMSNorm(), self.mixer.clone()

            def __call__(self, x, _):
                return x + self.mix(self.norm(x)), None

        block = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return block(self.mixer.clone(parent=None), name="layers")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("name", ["titans, grm, logarithmic", "attention"])
def test_scan_over_layers(name, remat):
    x, mixer = inputs(), LAYERS[name]
    model = Stack(mixer.clone(decode=True), remat)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    kernel = variables["params"]["layers"]["mix"]["query"]["kernel"]
    assert kernel.names == ("layers", "embed", "heads")
    assert kernel.value.shape == (3, FEATURES, FEATURES)
    assert not np.allclose(kernel.value[0], kernel.value[1])
    params = nn.meta.unbox(variables["params"])["layers"]
    expected, norm = x, nn.RMSNorm()
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], params)
        normed = norm.apply({"params": one["norm"]}, expected)
        expected = expected + mixer.apply({"params": one["mix"]}, normed)

    whole = Stack(mixer, remat)
    np.testing.assert_allclose(whole.apply(variables, x), expected, atol=1e-5)
    y, _ = stream(model, variables, x, [11, 1, 1])
    np.testing.assert_allclose(y, expected, atol=1e-5)

    gradient = jax.jit(jax.grad(lambda params: (whole.apply({"params": params}, x) ** 2).sum()))
    kernel = gradient(variables["params"])["layers"]["mix"]["value"]["kernel"]
    assert (abs(kernel.value).max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize("transform", [nn.jit, nn.remat])
def test_transformed_module(transform):
    x = inputs()
    module = transform(mc.nn.linen.MemoryCaching)(FEATURES, HEADS, **STREAMS[next(iter(STREAMS))])
    variables = module.init(jax.random.key(0), x)
    full = GRM.apply(variables, x)
    np.testing.assert_allclose(module.apply(variables, x), full, atol=1e-5)
    module = module.clone(decode=True)
    variables = {**variables, "cache": module.init_cache(2, 13)}
    y, _ = stream(module, variables, x, [12, 1], jit=False)
    np.testing.assert_allclose(y, full, atol=1e-5)


def test_tabulate_counts_every_parameter():
    x = inputs()
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(GRM.init, jax.random.key(0), x)))
    table = GRM.tabulate(jax.random.key(0), x, console_kwargs={"width": 200})
    assert f"{count:,}" in table
    assert "temperature" in table


def test_to_nnx_gives_the_methods_of_the_layer():
    x = inputs()
    variables = GRM.init(jax.random.key(0), x)
    layer = GRM.bind(variables).to_nnx()
    assert layer.gates(x).shape == (2, 13, HEADS, 2)
    np.testing.assert_allclose(layer(x), GRM.apply(variables, x), atol=1e-6)


class TestErrors:
    def test_number_of_heads(self):
        with pytest.raises(ValueError, match="num_heads must be given"):
            mc.nn.linen.Attention(FEATURES).init(jax.random.key(0), inputs())

    def test_what_the_nnx_layer_refuses(self):
        with pytest.raises(ValueError, match="must divide"):
            PLAIN.clone(num_heads=5).init(jax.random.key(0), inputs())
        variables = PLAIN.init(jax.random.key(0), inputs())
        with pytest.raises(ValueError, match="document_ids must be integers"):
            PLAIN.apply(variables, inputs(), jnp.ones((2, 13)))

    @pytest.mark.parametrize("name", LAYERS)
    def test_full_cache(self, name):
        x, module = inputs(), LAYERS[name].clone(decode=True)
        variables = module.init(jax.random.key(0), x)
        if name == "attention, window":
            _, variables = stream(module, variables, x, [13, 1], jit=False)
            return
        _, full = stream(module, variables, x, [13])
        with pytest.raises(ValueError, match="holds 1[36] tokens in a row and would have"):
            module.apply(full, x[:, :4], mutable=["cache"])
        y, _ = stream(module, full, x, [4])
        assert jnp.isnan(y).any()

    @pytest.mark.parametrize("module", [PLAIN, GRM], ids=["attention", "memory caching"])
    def test_cache(self, module):
        x, module = inputs(), module.clone(decode=True)
        variables = module.init(jax.random.key(0), x)
        with pytest.raises(flax.errors.ModifyScopeVariableError):
            module.apply(variables, x)
        with pytest.raises(ValueError, match="got none: give variables"):
            module.apply({"params": variables["params"]}, x, mutable=["cache"])
        with pytest.raises(ValueError, match=r"\['a', 'b'\]: give variables"):
            module.apply({**variables, "cache": {"b": 1, "a": 2}}, x, mutable=["cache"])
        with pytest.raises(ValueError, match="give no document_ids"):
            module.apply(variables, x, jnp.zeros((2, 13), int), mutable=["cache"])
        with pytest.raises(ValueError, match="this layer and input need"):
            module.apply(variables, inputs(batch=3), mutable=["cache"])

    def test_cache_of_another_layer(self):
        x = inputs()
        variables = GRM.clone(decode=True).init(jax.random.key(0), x)
        small = GRM.clone(decode=True, segmentation=mc.Constant(2))
        with pytest.raises(ValueError, match="this layer and input need"):
            small.apply(variables, x, mutable=["cache"])
        cache = PLAIN.clone(decode=True, in_features=FEATURES).init_cache(2, 13)
        with pytest.raises(ValueError, match="arrays of the cache must be"):
            small.apply({**variables, "cache": cache}, x, mutable=["cache"])

    def test_parameters_of_another_layer(self):
        x = inputs()
        variables = GRM.clone(memory=mc.memories.SSD()).init(jax.random.key(0), x)
        other = GRM.clone(memory=mc.memories.GatedDeltaNet())
        with pytest.raises(ValueError, match="unknown: .'controls/lam/bias'"):
            other.apply(variables, x)
        with pytest.raises(flax.errors.ScopeParamShapeError):
            GRM.apply(variables, x[..., :16])
        params = {n: x for n, x in variables["params"].items() if n != "temperature"}
        with pytest.raises(flax.errors.ScopeParamNotFoundError, match="temperature"):
            GRM.apply({"params": params}, x)
