"""The names of axes, and the mesh's axes that stand for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import memcache_jax as mc
from memcache_jax.sharding import constrain
from tests.covers import first_kept

KINDS = [AxisType.Explicit, AxisType.Auto]
RULES = (("embed", "fsdp"), ("heads", "tp"), ("mlp", "tp"), ("vocab", None))
WANTED = dict(
    query=P("fsdp", "tp"), out=P("tp", "fsdp"), W2=P("tp", "fsdp", None), temperature=P("tp")
)


def foreign_mesh(kind):
    return jax.make_mesh((2, 2, 2), ("dp", "fsdp", "tp"), axis_types=(kind,) * 3)


def make(**options):
    return mc.nn.MemoryCaching(
        16,
        4,
        memory=mc.memories.Titans(4, 2),
        aggregation=mc.GRM(),
        segmentation=mc.Constant(8),
        rngs=nnx.Rngs(0),
        **options,
    )


def specs(state):
    """The layouts of some parameters, without the None at the ends."""
    params = nnx.to_pure_dict(state)

    def spec(x):
        x = getattr(getattr(x, "sharding", x), "spec", getattr(x, "sharding", x))
        entries = list(x)
        while entries and entries[-1] is None:
            entries.pop()
        return P(*entries)

    found = dict(
        query=params["query"]["kernel"],
        out=params["out"]["kernel"],
        W2=params["weights"]["W2"],
        temperature=params["temperature"],
    )
    return {name: spec(x) for name, x in found.items()}


def ends_cut(wanted):
    return {n: P(*s[:-1]) if s[-1] is None else s for n, s in wanted.items()}


WANTED = ends_cut(WANTED)
WHOLE = dict.fromkeys(WANTED, P())


def test_without_a_mesh_nothing_changes():
    x = jnp.ones((3, 5))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))):
        np.testing.assert_array_equal(constrain(x, "batch", None), x)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rules_may_be_in_context_when_layouts_are_asked_for(kind):
    state, mesh = nnx.state(make()), foreign_mesh(kind)
    assert specs(nnx.get_partition_spec(state)) == WHOLE
    assert specs(nnx.get_named_sharding(state, mesh)) == WHOLE
    with logical_axis_rules(RULES):
        assert specs(nnx.get_partition_spec(state)) == WANTED
        assert specs(nnx.get_named_sharding(state, mesh)) == WANTED
    with logical_axis_rules((("heads", "dp"),)):  # the rules of another host
        assert specs(nnx.get_named_sharding(state, mesh))["query"] == P(None, "dp")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_models_that_are_made_by_shape(kind):
    mesh = foreign_mesh(kind)
    with jax.set_mesh(mesh):
        assert specs(nnx.state(nnx.eval_shape(make))) == WHOLE
    assert specs(nnx.get_abstract_model(make, mesh)[1]) == WHOLE
    with logical_axis_rules(RULES):
        assert specs(nnx.get_abstract_model(make, mesh)[1]) == WANTED
        with jax.set_mesh(mesh):
            assert specs(nnx.state(nnx.eval_shape(make))) == WANTED


@pytest.mark.parametrize("kind", first_kept(1, KINDS), ids=str)
def test_parameters_and_their_moments_are_made_where_rules_say(kind):
    def create():
        model = make()
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    with jax.set_mesh(foreign_mesh(kind)), logical_axis_rules(RULES):
        assert specs(nnx.state(make(), nnx.Param)) == WANTED
        model, optimizer = nnx.jit(create)()
    assert specs(nnx.state(model, nnx.Param)) == WANTED
    assert specs(nnx.state(optimizer)["opt_state"][0]["mu"]) == WANTED


@pytest.mark.parametrize("kind", first_kept(1, KINDS), ids=str)
def test_a_mapping_of_the_hosts_names(kind):
    names = dict(embed="fsdp", heads="tp")
    with jax.set_mesh(foreign_mesh(kind)):
        model = nnx.jit(lambda: make(axis_names=names))()
    assert specs(nnx.state(model, nnx.Param)) == WANTED
    assert specs(nnx.get_partition_spec(nnx.state(model))) == WANTED
    # Logical names of the host's own.
    model = make(axis_names=dict(embed="embed_of_host", heads=("a", "b")))
    kernel = model.query.kernel
    spec = nnx.get_partition_spec(kernel).get_value()
    assert spec == P("embed_of_host", ("a", "b"))
    with logical_axis_rules((("embed_of_host", "fsdp"),)):
        spec = nnx.get_partition_spec(kernel).get_value()
    assert spec == P("fsdp", ("a", "b"))
    with pytest.raises(ValueError, match=r"axis_names are for .*; got features"):
        make(axis_names=dict(features="fsdp"))


@pytest.mark.slow
def test_a_mesh_whose_axes_have_our_names():
    mesh = jax.make_mesh((2, 2), ("heads", "embed"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        kernel: Any = make(axis_names=dict(heads="heads", embed="embed")).query.kernel[...]
    assert kernel.sharding.spec == P("embed", "heads")
    # Of several rules for a name the last holds, for parameters and for tokens.
    rules = (("heads", "dp"), ("heads", "tp"))
    with jax.set_mesh(foreign_mesh(AxisType.Auto)), logical_axis_rules(rules):
        assert specs(nnx.state(make()))["temperature"] == P("tp")
        laid: Any = constrain(jnp.ones((4, 4)), None, "heads").sharding
        assert laid.spec == P(None, "tp")


@pytest.mark.slow
def test_the_mesh_of_this_library_has_rules_of_its_own():
    mesh = mc.sharding.make_mesh(dict(fsdp=4, tensor=2))
    wanted = dict(query=P(("fsdp", "seq"), "tensor"), out=P("tensor", ("fsdp", "seq")))
    found = specs(nnx.get_abstract_model(make, mesh)[1])
    assert {name: found[name] for name in wanted} == wanted
    with jax.set_mesh(mesh):
        assert specs(nnx.state(make()))["temperature"] == P("tensor")
        # A host's rules come first.
        with logical_axis_rules((("heads", "data"),)):
            assert specs(nnx.get_partition_spec(nnx.state(make())))["temperature"] == P("data")


@pytest.mark.slow
def test_layers_of_a_stack_have_a_name_too():
    config = mc.nn.LanguageModelConfig(vocab_size=8, num_layers=2, features=16, num_heads=2)
    with jax.set_mesh(foreign_mesh(AxisType.Auto)), logical_axis_rules((("layers", "dp"),)):
        model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
        kernel = model.layers.blocks[0].mixer.query.kernel
        assert nnx.get_partition_spec(kernel).get_value() == P("dp", None, None)
        assert kernel[...].sharding.spec[0] == "dp"
