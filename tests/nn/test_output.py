"""The output layer of a language model, also with an adapter that another library attached."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import memcache_jax as mc
from memcache_jax.nn.layers import Linear

FEATURES, VOCAB, RANK = 8, 12, 2


class Adapted(Linear):
    """A projection as qwix makes it: the adapter acts where the projection is called."""

    lora_a: Any
    lora_b: Any

    def __call__(self, inputs, out_sharding=None):
        del out_sharding
        return super().__call__(inputs) + inputs @ self.lora_a[...] @ self.lora_b[...]


def test_the_loss_goes_through_an_adapter_of_another_library():
    mixer = mc.nn.MemoryCachingMixer(mc.memories.LinearAttention(), mc.GRM(), mc.Constant(4))
    config = mc.nn.LanguageModelConfig(VOCAB, 1, FEATURES, 2, mixers=(mixer,), logit_scale=0.5)
    model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 4)
    hidden = jax.random.normal(keys[0], (2, 3, FEATURES))
    targets = jax.random.randint(keys[1], (2, 3), 0, VOCAB)
    before = model.cross_entropy(hidden, targets).total
    head: Any = model.head
    head.lora_a = nnx.LoRAParam(jax.random.normal(keys[2], (FEATURES, RANK)))
    head.lora_b = nnx.LoRAParam(jax.random.normal(keys[3], (RANK, VOCAB)))
    head.__class__ = Adapted
    graph, adapter, rest = nnx.split(model, nnx.LoRAParam, ...)

    def plain(model):
        log_p = jax.nn.log_softmax(model.logits(hidden))
        return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).sum()

    def gradients(loss):
        run = jax.value_and_grad(lambda adapter: loss(nnx.merge(graph, adapter, rest)))
        return jax.tree.leaves(jax.jit(run)(adapter))

    got = gradients(lambda model: model.cross_entropy(hidden, targets).total)
    assert len(got) == 3
    assert abs(got[0] - before) > 0.1
    for one, other in zip(got, gradients(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
