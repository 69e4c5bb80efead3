"""Models that get new parameters beside those that they have."""

import dataclasses

import jax
from flax import nnx

from memcache_jax._checks import check_instance
from memcache_jax.nn.config import LanguageModelConfig
from memcache_jax.nn.language_model import LanguageModel, abstract_model
from memcache_jax.nn.layers import Linear
from memcache_jax.nn.lora import LoRA


def with_lora(
    model: LanguageModel, *, rank: int = 16, alpha: float = 16.0, rngs: nnx.Rngs
) -> LanguageModel:
    """Adds low-rank adapters to the projections of a model's blocks: LoRA (arXiv:2106.09685).

    W x becomes W x + (alpha / rank) B A x, with B zero: the model computes what it did until the
    adapters are trained. They are stacked as the layers' other parameters are, one of each layer.

    Args:
      model: a language model without adapters.
      rank: rows of A.
      alpha: the factor, times the rank.
      rngs: random keys, of A.

    Returns:
      A new model with the same parameter arrays, and new ones below each ``low_rank``. The given
      model is unchanged.

    Raises:
      ValueError: for a model that has adapters, or a rank or an alpha that is not positive.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc, optax
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=2, features=64, num_heads=4)
      >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
      >>> model = mc.nn.with_lora(model, rank=4, rngs=nnx.Rngs(1))
      >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.PathContains("low_rank"))
      >>> merged = mc.nn.merge_lora(model)
    """
    check_instance("model", model, LanguageModel, "an mc.nn.LanguageModel")
    check_instance("rngs", rngs, nnx.Rngs, "an nnx.Rngs")
    if model.config.lora is not None:
        raise ValueError(f"the model has adapters, {model.config.lora}: merge_lora makes them part")
    return grown(model, dataclasses.replace(model.config, lora=LoRA(rank, alpha)), rngs)


def merge_lora(model: LanguageModel) -> LanguageModel:
    """Returns a model without adapters that computes the same: W + (alpha / rank) B A for each W.

    The sum is kept in the wider of both dtypes. A model without adapters is returned as it is.

    Args:
      model: from ``with_lora``; it is unchanged.

    Raises:
      ValueError: for anything but a language model.

    Example: see ``with_lora``.
    """
    check_instance("model", model, LanguageModel, "an mc.nn.LanguageModel")
    if model.config.lora is None:
        return model
    graph, state = nnx.split(model)
    new = nnx.merge(graph, jax.tree.map(lambda x: x, state))  # with variables of its own
    return merge_in_place(new)


def merge_in_place(model: LanguageModel, *, delete: bool = False) -> LanguageModel:
    """``merge_lora`` of the model itself, one projection after the other.

    Args:
      model: from ``with_lora``.
      delete: whether to delete the arrays of each projection, whoever else has them, once their sum
        is there: beside one model no more than a projection is held then.
    """
    for linear in [part for _, part in nnx.iter_modules(model) if isinstance(part, Linear)]:
        if linear.low_rank is None:
            continue
        old = jax.tree.leaves((linear.kernel, linear.low_rank))
        linear.kernel.set_value(linear.low_rank.merged(linear.kernel[...]))
        del linear.low_rank
        if delete:
            jax.block_until_ready(linear.kernel[...])
            for x in old:
                x.delete()
    model.config = dataclasses.replace(model.config, lora=None)
    return model


def grown(model: LanguageModel, config: LanguageModelConfig, rngs: nnx.Rngs) -> LanguageModel:
    """A model of this configuration with the parameters that a model has, and new ones as made."""
    graph, state = abstract_model(config)
    there = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    wanted = nnx.to_flat_state(state)

    @jax.jit
    def make(key: jax.Array) -> dict:
        made = nnx.state(LanguageModel(config, rngs=nnx.Rngs(key)), nnx.Param)
        return {path: x.get_value() for path, x in nnx.to_flat_state(made) if path not in there}

    made = make(rngs.params())
    for path, param in wanted:
        param.set_value(there[path].get_value() if path in there else made[path])
    new = nnx.merge(graph, state)
    new.published = model.published
    return new
