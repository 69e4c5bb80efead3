"""Published models read to where they live on a mesh."""

import jax
import pytest
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, NamedSharding

import memcache_jax as mc
from tests.cases import assert_close
from tests.pretrained.test_read import FOLDERS, expected

RULES = (("batch", "rows"), ("embed", "rows"), ("heads", "model"), ("mlp", "model"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next"])
def test_parameters_are_divided_as_they_are_read(name, kind):
    devices = jax.devices()[:4]
    if kind is None:
        mesh, rules = mc.sharding.make_mesh(dict(fsdp=2, tensor=2), devices=devices), ()
    else:
        types = (kind, kind)
        mesh = jax.make_mesh((2, 2), ("rows", "model"), axis_types=types, devices=devices)
        rules = RULES
    tokens, wanted = expected(name)
    with jax.set_mesh(mesh), logical_axis_rules(rules):
        model = mc.pretrained.load(FOLDERS / name)
        kernel = model.layers[0].blocks[0].mixer.key.linear.kernel.get_value()
        assert isinstance(kernel.sharding, NamedSharding)
        _, rows, heads = kernel.sharding.spec
        assert heads in ("model", "tensor")
        assert rows is not None
        got = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
    assert_close(got, wanted, 2e-5)
