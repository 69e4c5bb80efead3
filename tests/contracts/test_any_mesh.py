"""Meshes as other people make them: any axes, Explicit or Auto, give what one device gives."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memcache_jax as mc
from memcache_jax.kernels._dispatch import interpret_kernels
from tests.cases import COVER, MEMORIES, assert_close, make_inputs
from tests.covers import first_kept, kept_of, rules

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
# The logical names and the mesh of a large public trainer, most of whose axes have one device.
MANY_AXES = (
    *("diloco", "data", "stage", "fsdp", "fsdp_transpose", "sequence", "context", "tensor"),
    *("tensor_transpose", "tensor_sequence", "expert", "autoregressive"),
)
RULES = (("batch", "rows"), ("heads", "model"))
ROWS, HEADS, LENGTH = 4, 4, 20
DOCUMENTS = [[3] * 4 + [0] * 4 + [7] * 8 + [5] * 4] * ROWS


slow = pytest.mark.slow


def mesh_of(shape, names, *types):
    types = types * len(shape) if len(types) == 1 else types
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


def put(tree, mesh, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def laid(inputs, memory, mesh, rows: Any = "rows", heads: Any = "model", time=None):
    """The arguments of ``memory_caching``, divided over a mesh."""
    axes = dict(b=rows, t=time, h=heads)
    out = {
        name: put(inputs[name], mesh, rows, time, heads)
        for name in ("query", "key", "value", "connector")
    }
    out["controls"] = {
        name: put(x, mesh, *map(axes.get, memory.controls[name].axes.split()))
        for name, x in inputs["controls"].items()
    }
    return out | {"weights": put(inputs["weights"], mesh, heads)}


def float32_inputs(memory, length=LENGTH):
    inputs = make_inputs(memory, length, batch=ROWS, heads=HEADS, dtype=np.float32)
    return jax.tree.map(jnp.asarray, inputs)


def value_and_gradients(inputs, **how):
    @jax.jit
    def both(inputs):
        y, pull = jax.vjp(lambda inputs: mc.memory_caching(**inputs, **how), inputs)
        return y, pull(jnp.cos(y))[0]

    return both(inputs)


@functools.cache
def of_one_device(memory, kind):
    """Inputs, and the value and gradients of ``Constant(8)``."""
    inputs = float32_inputs(memory)
    how: Any = dict(memory=memory, aggregation=kind, segmentation=mc.Constant(8))
    return inputs, value_and_gradients(inputs, **how)


def assert_same(got, wanted, tolerance=1e-5):
    jax.tree.map(lambda x, y: assert_close(np.asarray(x), np.asarray(y), tolerance), got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", rules(0, among=COVER))
def test_every_rule_where_explicit_axes_divide_rows_and_heads(name):
    memory = MEMORIES[name]
    kind = mc.SSC(top_k=2) if list(COVER).index(name) % 2 else mc.GRM()
    how: Any = dict(memory=memory, aggregation=kind, segmentation=mc.Constant(8))
    inputs, wanted = of_one_device(memory, kind)
    mesh = mesh_of((2, 4), ("rows", "model"), EXPLICIT)
    with jax.set_mesh(mesh):
        got = value_and_gradients(laid(inputs, memory, mesh), **how)
    assert_same(got, wanted, 2e-5)
    assert jax.typeof(got[0]).sharding.spec == P("rows", None, "model", None)
    assert got[1]["key"].sharding.spec == P("rows", None, "model", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("types", "options"),
    first_kept(
        4,
        [
            ((AUTO, AUTO), dict(rules=RULES)),
            ((EXPLICIT, AUTO), {}),
            ((EXPLICIT, EXPLICIT), dict(document_ids=DOCUMENTS)),
            ((EXPLICIT, EXPLICIT), dict(start="checkpoint", segmentation=mc.Logarithmic(4))),
            ((AUTO, AUTO), {}),
            ((EXPLICIT, EXPLICIT), dict(implementation="reference")),
            ((EXPLICIT, EXPLICIT), dict(shape=(1, 2))),
            ((EXPLICIT, EXPLICIT), dict(shape=(1, 1))),
        ],
    ),
    ids=str,
)
def test_kinds_of_axes(types, options):
    rules, shape = options.pop("rules", ()), options.pop("shape", (2, 4))
    memory = MEMORIES["gated_deltanet"]
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(8)) | options
    if "document_ids" in how:
        how["document_ids"] = jnp.array(how["document_ids"])
    if options.keys() <= {"implementation"}:
        inputs, wanted = of_one_device(memory, how["aggregation"])
    else:
        inputs = float32_inputs(memory)
        wanted = value_and_gradients(inputs, **how)
    mesh = mesh_of(shape, ("rows", "model"), *types)
    with jax.set_mesh(mesh), logical_axis_rules(rules):
        got = value_and_gradients(laid(inputs, memory, mesh), **how)
    assert_same(got, wanted, 2e-5)
    spec = got[0].sharding.spec
    assert shape == (1, 1) or "model" in spec


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_kernels_on_explicit_axes(implementation):
    memory = MEMORIES["linear"]
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(8))
    inputs = float32_inputs(memory, 8)
    mesh = mesh_of((2,), ("dp",), EXPLICIT)
    wanted = mc.memory_caching(**inputs, **how)
    with jax.set_mesh(mesh), interpret_kernels():
        rows = laid(inputs, memory, mesh, rows="dp", heads=None)
        run = jax.jit(functools.partial(mc.memory_caching, **how, implementation=implementation))
        assert_same(run(**rows), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", kept_of(["gather", "ring"], "ring"))
def test_explicit_axes_divide_time(exchange):
    memory = MEMORIES["gated_deltanet"]
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(4))
    inputs = float32_inputs(memory)
    wanted = value_and_gradients(inputs, **how)
    mesh = mesh_of((2, 2), ("context", "model"), EXPLICIT)
    with jax.set_mesh(mesh):
        rows = laid(inputs, memory, mesh, None, "model", "context")
        got = value_and_gradients(rows, **how, exchange=exchange)
    assert_same(got, wanted, 2e-5)
    assert jax.typeof(got[0]).sharding.spec == P(None, "context", "model", None)


@pytest.mark.slow
def test_rows_on_a_mesh_that_is_not_in_context_and_in_a_shard_map():
    memory = MEMORIES["titans"]
    how: Any = dict(memory=memory, aggregation=mc.SSC(top_k=2), segmentation=mc.Constant(8))
    inputs = float32_inputs(memory)
    wanted = mc.memory_caching(**inputs, **how)
    mesh = mesh_of((2, 2), ("rows", "model"), EXPLICIT)
    rows = laid(inputs, memory, mesh)
    y = mc.memory_caching(**rows, **how)
    assert_same(y, wanted)
    assert jax.typeof(y).sharding.spec == P("rows", None, "model", None)
    tokens = {name: x for name, x in rows.items() if name != "weights"}

    @functools.partial(
        jax.shard_map,
        in_specs=(P("rows"), P()),
        out_specs=P("rows"),
        axis_names={"rows"},
        check_vma=False,
    )
    def by_hand(tokens, weights):
        return mc.memory_caching(**tokens, weights=weights, **how)

    with jax.set_mesh(mesh):
        assert_same(jax.jit(by_hand)(tokens, rows["weights"]), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    first_kept(
        3,
        [
            ("gated_deltanet", mc.GRM(), dict(start="checkpoint")),
            ("titans", mc.GRM(), dict(document_ids=DOCUMENTS)),
            ("vector", mc.Soup(), dict(segmentation=mc.Logarithmic(4))),
            ("linear", mc.SSC(top_k=2), {}),
            ("dla", mc.SSC(top_k=2, inner="soup"), dict(start="checkpoint")),
            ("swla", mc.Residual(), dict(implementation="reference")),
        ],
    ),
    ids=str,
)
def test_a_shard_map_that_checks_what_varies(name, kind, options):
    memory = MEMORIES[name]
    how: Any = dict(memory=memory, aggregation=kind, segmentation=mc.Constant(8)) | options
    inputs = float32_inputs(memory)
    if "document_ids" in how:
        inputs["document_ids"] = jnp.array(how.pop("document_ids"))
    of_heads = {"weights": inputs.pop("weights")}
    of_heads["constants"] = {n: x for n, x in inputs["controls"].items() if x.ndim == 1}
    inputs["controls"] = {n: x for n, x in inputs["controls"].items() if x.ndim > 1}

    def core(rows, of_heads):
        controls = rows["controls"] | of_heads["constants"]
        return mc.memory_caching(
            **rows | {"controls": controls}, **how, weights=of_heads["weights"]
        )

    def both(core, rows, of_heads):
        y, pull = jax.vjp(core, rows, of_heads)
        return y, pull(jnp.cos(y))

    wanted = jax.jit(functools.partial(both, core))(inputs, of_heads)
    floats = jax.tree.map(lambda x: x.dtype != jax.dtypes.float0, wanted)
    for first in (AUTO, EXPLICIT):
        mesh = mesh_of((2, 2), ("rows", "other"), first, AUTO)
        by_hand = jax.shard_map(core, in_specs=(P("rows"), P()), out_specs=P("rows"))
        with jax.set_mesh(mesh):
            rows = put(inputs, mesh, "rows" if first == EXPLICIT else None)
            got = jax.jit(functools.partial(both, by_hand))(rows, put(of_heads, mesh))
        got, known = (
            jax.tree.map(lambda x, is_: x if is_ else 0, t, floats) for t in (got, wanted)
        )
        assert_same(got, known, 2e-5)


@pytest.mark.slow
def test_a_model_and_its_stream_in_a_shard_map_that_checks_what_varies():
    model, tokens = model_and_tokens()
    tokens = jnp.asarray(tokens)
    graph, state = nnx.split(model)

    def whole(state, tokens):
        return nnx.merge(graph, state)(tokens)

    def stream(state, tokens):
        model = nnx.merge(graph, state)
        cache, hidden = model.init_cache(len(tokens), tokens.shape[1]), []
        for piece in (tokens[:, :7], tokens[:, 7:8], tokens[:, 8:]):
            rows, cache = model.extend(piece, cache)
            hidden.append(rows)
        return model.logits(jnp.concatenate(hidden, axis=1))

    def slopes(logits, state, tokens):
        return jax.grad(lambda state: jnp.sum(jnp.cos(logits(state, tokens))))(state)

    wanted = jax.jit(whole)(state, tokens)
    wanted_slopes = jax.jit(functools.partial(slopes, whole))(state, tokens)
    mesh = mesh_of((4,), ("rows",), EXPLICIT)
    with jax.set_mesh(mesh):
        rows, everywhere = put(tokens, mesh, "rows"), put(state, mesh)
        mapped = functools.partial(jax.shard_map, in_specs=(P(), P("rows")), out_specs=P("rows"))
        for run in (whole, stream):
            assert_same(jax.jit(mapped(run))(everywhere, rows), wanted)
        got = jax.jit(functools.partial(slopes, mapped(whole)))(everywhere, rows)
    assert_same(got, wanted_slopes, 2e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_vmap_over_what_a_mesh_divides_is_refused(stream):
    how: Any = dict(memory=MEMORIES["linear"], aggregation=mc.GRM(), segmentation=mc.Constant(8))
    mesh = mesh_of((2,), ("models",), EXPLICIT)

    def core(rows):
        if not stream:
            return mc.memory_caching(rows, rows, rows, rows, **how)
        cache = mc.init_cache(2, 2, 4, 4, **how, max_segments=2)
        return mc.extend(cache, rows, rows, rows, rows)[0]

    with jax.set_mesh(mesh):
        rows = put(jnp.ones((2, 2, 12, 2, 4)), mesh, "models")
        with pytest.raises(ValueError, match=r"jax.vmap goes over .* divides over models"):
            jax.vmap(core)(rows)


def model_and_tokens(axis_names=None):
    mixers = (
        mc.nn.MemoryCachingMixer(mc.memories.GatedDeltaNet(), mc.SSC(top_k=2), mc.Constant(4)),
        mc.nn.AttentionMixer(window=6),
    )
    config = mc.nn.LanguageModelConfig(
        vocab_size=16,
        num_layers=2,
        features=16,
        num_heads=4,
        mlp_features=16,
        mixers=mixers,
        tie_embeddings=axis_names is None,
    )
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0), axis_names=axis_names)
    tokens = np.random.default_rng(0).integers(0, 16, (8, 12)).astype(np.int32)
    return model, tokens


@nnx.jit
@nnx.value_and_grad
def step(model, tokens, document_ids):
    logits = model(tokens, document_ids)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


@functools.cache
def step_of_one_device():
    """Tokens, their documents, and the loss and gradients."""
    model, tokens = model_and_tokens({})
    documents = np.sort(tokens, axis=1)
    return tokens, documents, step(model, tokens, documents)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "names", "types", "rows", "axis_names"),
    first_kept(
        2,
        {
            "auto": ((2, 2, 2), ("dp", "fsdp", "tp"), (AUTO,), (("dp", "fsdp"),), None),
            "many axes": (
                (1, 2, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1),
                MANY_AXES,
                (EXPLICIT,),
                (("data", "fsdp"),),
                dict(embed=("fsdp", "sequence"), heads=("tensor", "autoregressive"), mlp="tensor"),
            ),
            "time": ((4, 2), ("fsdp", "sp"), (EXPLICIT,), ("fsdp", "sp"), dict(embed="fsdp")),
            "dp": ((2,), ("dp",), (EXPLICIT,), ("dp",), {}),
            "explicit": ((2, 2, 2), ("dp", "fsdp", "tp"), (EXPLICIT,), (("dp", "fsdp"),), None),
        },
    ),
)
def test_a_language_model(shape, names, types, rows, axis_names):
    if axis_names is None:
        axis_names = dict(embed="fsdp", heads="tp", mlp="tp", vocab="tp")
    tokens, documents, wanted = step_of_one_device()
    mesh = mesh_of(shape, names, *types)
    with jax.set_mesh(mesh):
        model, _ = model_and_tokens(axis_names)
        got = step(model, put(tokens, mesh, *rows), put(documents, mesh, *rows))
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    pure = [nnx.to_pure_dict(gradients) for _, gradients in (got, wanted)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), *pure)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), first_kept(1, [("gated_deltanet", EXPLICIT), ("titans", AUTO)]), ids=str
)
def test_gradients_in_bfloat16(name, kind):
    layer = mc.nn.MemoryCaching(
        8,
        2,
        memory=MEMORIES[name],
        aggregation=mc.GRM(),
        segmentation=mc.Constant(4),
        dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )

    @nnx.jit
    def gradients(layer, x):
        # The gradient of a sum over rows is one of another part of them on every device.
        return nnx.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32) ** 2))(layer)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 12, 8)), jnp.bfloat16)
    wanted = gradients(layer, x)
    mesh = mesh_of((2, 1), ("rows", "stage"), kind)
    with jax.set_mesh(mesh), logical_axis_rules((("batch", "rows"), ("heads", "model"))):
        got = gradients(layer, put(x, mesh, "rows"))
    assert_same(nnx.to_pure_dict(nnx.state(got)), nnx.to_pure_dict(nnx.state(wanted)), 5e-2)


@functools.cache
def hidden_of_one_device():
    model, tokens = model_and_tokens({})
    return np.asarray(nnx.jit(lambda model, tokens: model.hidden(tokens))(model, tokens))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sharding"),
    first_kept(
        1,
        [
            (EXPLICIT, P("dp", "tp")),
            (AUTO, P("dp")),
            (EXPLICIT, None),
            (AUTO, None),
            (AUTO, P("dp", "tp")),
        ],
    ),
    ids=str,
)
def test_streams(kind, sharding):
    wanted = hidden_of_one_device()
    mesh = mesh_of((2, 2), ("dp", "tp"), kind)

    @nnx.jit
    def step(model, tokens, cache):
        return model.extend(tokens, cache)

    with jax.set_mesh(mesh):
        model, tokens = model_and_tokens(dict(embed=None, heads="tp", mlp="tp", vocab=None))
        cache = model.init_cache(len(tokens), tokens.shape[1], sharding=sharding)
        if sharding is not None:
            keys, bank = cache.states[1][0], cache.states[0][0]
            for array in (keys, *jax.tree.leaves(bank)):
                assert array.sharding.spec[: len(sharding) + 1] == (None, *sharding)
        for begin, end in ((0, 5), (5, 6), (6, 11)):
            piece = put(tokens[:, begin:end], mesh, "dp")
            hidden, cache = step(model, piece, cache)
            np.testing.assert_allclose(hidden, wanted[:, begin:end], atol=3e-5)
        if kind == EXPLICIT:
            assert jax.typeof(hidden).sharding.spec == P("dp", None, None)
            assert jax.typeof(cache.states[1][0]).sharding.spec[1:3] == ("dp", "tp")
        again = cache.reset(jnp.arange(8) > 3).take(jnp.array([4, 5, 6, 7, 0, 1, 2, 3]))
        hidden, _ = step(model, put(tokens[:4, :5].repeat(2, axis=0), mesh, "dp"), again)
        np.testing.assert_allclose(
            np.asarray(hidden)[:4], wanted[:4, :5].repeat(2, axis=0)[:4], atol=1e-5
        )


@pytest.mark.slow
def test_a_cache_of_the_core_lies_as_it_is_told():
    memory = MEMORIES["titans"]
    how: Any = dict(memory=memory, aggregation=mc.GRM(), segmentation=mc.Constant(4))
    inputs = float32_inputs(memory)
    wanted = mc.memory_caching(**inputs, **how)
    mesh = mesh_of((2, 2), ("rows", "model"), EXPLICIT)
    layout = NamedSharding(mesh, P("rows", "model"))
    options: Any = dict(weights=inputs["weights"], max_length=LENGTH)
    cache = mc.init_cache(ROWS, HEADS, 4, 4, **how, **options, sharding=layout)
    assert jax.typeof(cache.pooled).sharding.spec == P("rows", "model", None, None)
    tokens = {name: x for name, x in laid(inputs, memory, mesh).items() if name != "weights"}
    with jax.set_mesh(mesh):
        y, cache = jax.jit(mc.extend)(cache, **tokens)
    assert_same(y, wanted)
    assert jax.typeof(y).sharding.spec == P("rows", None, "model", None)
    assert jax.typeof(cache.pooled).sharding.spec == P("rows", "model", None, None)
    unknown = pytest.raises(ValueError, match="the mesh has the axes rows, model; got data")
    with jax.set_mesh(mesh), unknown:
        mc.init_cache(ROWS, HEADS, 4, 4, **how, **options, sharding=P("data"))
    router = how | dict(aggregation=mc.SSC(top_k=1))
    with jax.set_mesh(mesh):
        empty = jax.jit(lambda: mc.init_cache(ROWS, HEADS, 4, 4, **how, **options, sharding=layout))
        assert jax.typeof(empty().pooled).sharding.spec == P("rows", "model", None, None)
        (bank, *_) = mc.init_cache(
            ROWS, HEADS, 4, 4, **router, **options, placement="host", sharding=layout
        ).bank
        assert bank.sharding.memory_kind == "pinned_host"
        assert bank.sharding.spec[:2] == ("rows", None)
    with pytest.raises(ValueError, match="needs a mesh"):
        mc.init_cache(ROWS, HEADS, 4, 4, **how, **options, sharding=P("rows"))
    with pytest.raises(ValueError, match="of rows, or of rows and heads"):
        mc.init_cache(ROWS, HEADS, 4, 4, **how, **options, sharding=P("rows", None, "model"))


@pytest.mark.parametrize(
    ("kind", "rules"), [(EXPLICIT, ()), (AUTO, ()), (AUTO, (("batch", "dp"),))], ids=str
)
@pytest.mark.parametrize(
    "name",
    kept_of(
        ["gated_deltanet", "titans", "attention", "memory as context"],
        "gated_deltanet",
        fast=["attention"],
    ),
)
def test_nothing_gathers_a_batch(name, kind, rules):
    mixer = mc.nn.AttentionMixer()
    if name != "attention":
        kinds = mc.SSC(top_k=2) if name == "gated_deltanet" else mc.GRM()
        memory = MEMORIES["ssd" if name == "memory as context" else name]
        mixer = mc.nn.MemoryCachingMixer(memory, kinds, mc.Constant(4))
    if name == "memory as context":
        mixer = mc.nn.MemoryAsContextMixer(mixer, window=4)
    graph, state = nnx.split(mixer.build(16, 2, rngs=nnx.Rngs(0)))
    mesh = mesh_of((8,), ("dp",), kind)

    def train(state, x):
        return jnp.sum(nnx.merge(graph, state)(x) ** 2)

    with jax.set_mesh(mesh), logical_axis_rules(rules):
        x = put(jnp.ones((8, 12, 16)), mesh, "dp")
        step = jax.jit(jax.grad(train, argnums=1)).lower(put(state, mesh), x)
        text = step.compile().as_text() or ""
    collectives = set(re.findall(r" (all-gather|all-to-all|collective-permute)[-(]", text))
    assert not collectives


@pytest.mark.parametrize("name", kept_of(["linear", "titans"], "titans"))
def test_no_state_is_gathered_in_a_stream_that_the_compiler_divides(name):
    memory = MEMORIES[name]
    for kind in (mc.GRM(), mc.SSC(top_k=2)):
        how: Any = dict(memory=memory, aggregation=kind, segmentation=mc.Constant(4))
        inputs = float32_inputs(memory, 1)
        mesh = mesh_of((2, 2), ("x", "y"), AUTO)
        with jax.set_mesh(mesh):
            cache = mc.init_cache(
                ROWS,
                HEADS,
                4,
                4,
                **how,
                max_segments=6,
                weights=inputs["weights"],
                sharding=P("x", "y"),
            )
            tokens = laid(inputs, memory, mesh, "x", "y")
            del tokens["weights"]
            text = jax.jit(mc.extend).lower(cache, **tokens).compile().as_text() or ""
        assert not re.findall(r" (all-gather|all-to-all|collective-permute)[-(]", text)
