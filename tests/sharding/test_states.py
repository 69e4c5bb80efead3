"""Where parameters and optimizer states lie on a mesh."""

import jax
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

import memcache_jax as mc
from memcache_jax.sharding import make_mesh, param_shardings, state_shardings


def test_parameters_follow_the_names_of_their_axes():
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    mixer = mc.nn.MemoryCachingMixer(mc.memories.Titans(4), mc.GRM(), mc.Constant(8))
    config = mc.nn.LanguageModelConfig(
        vocab_size=257, num_layers=2, features=32, num_heads=2, mixers=(mixer,)
    )
    state = jax.eval_shape(
        lambda: nnx.split(mc.nn.LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)[1]
    )
    shardings = param_shardings(state, mesh)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    block = specs["layers"]["blocks"][0]
    over = ("fsdp", "seq")
    assert block["mixer"]["query"]["kernel"] == P(None, over, "tensor")
    assert block["mixer"]["out"]["kernel"] == P(None, "tensor", over)
    assert block["mixer"]["weights"]["W2"] == P(None, "tensor", over, None)
    assert block["mixer"]["weights"]["W1"] == P(None, "tensor", None, over)
    assert block["mlp"]["down"]["kernel"] == P(None, "tensor", over)
    # 257 ids are not divided by two.
    assert specs["embedding"]["embedding"] == P(None, over)
    params = nnx.to_pure_dict(state)
    adam = state_shardings(optax.adam(1e-3), params, shardings, mesh)[0]
    assert jax.tree.map(lambda s: s.spec, adam.mu) == specs
    assert adam.count.spec == P()
