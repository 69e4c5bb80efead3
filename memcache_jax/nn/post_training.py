"""Memory caching for a model that was trained without it."""

import dataclasses
from typing import TypeVar

from flax import nnx

from memcache_jax.aggregation import GRM, Aggregation
from memcache_jax.caching import check_configuration
from memcache_jax.nn.config import MemoryCachingMixer
from memcache_jax.nn.language_model import LanguageModel
from memcache_jax.nn.memory_caching import MemoryCaching
from memcache_jax.segmentation import Segmentation

Model = TypeVar("Model", bound=nnx.Module)


def with_memory_caching(
    model: Model,
    *,
    segmentation: Segmentation,
    aggregation: Aggregation | None = None,
) -> Model:
    """Gives an already trained recurrent model caches, with no new parameters.

    Post-training memory caching (Sec. 4.3 of arXiv:2602.24281): beyond the length it was trained
    at, a recurrent model keeps the memory of every training length and reads them all, each with
    the same weight. Every ``MemoryCaching`` layer of the model takes the new aggregation and
    segmentation.

    Args:
      model: any NNX module with ``MemoryCaching`` layers, such as a ``LanguageModel``.
      segmentation: where states are cached: ``Constant`` of the length that the model was trained
        at.
      aggregation: ``GRM(gate="uniform")`` by default. Others that need nothing learned are
        ``Soup`` with uniform gates and ``Residual``; gates by content are for layers that have a
        connector.

    Returns:
      A new model; its parameters are the same arrays. The given one is not changed.

    Raises:
      ValueError: for a model without such layers, a segment size that a memory's chunk size does
        not divide, or an aggregation whose gates the layers have no parameters for.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.presets.language_model("swla", "tiny", vocab_size=257)
      >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
      >>> longer = mc.nn.with_memory_caching(model, segmentation=mc.Constant(64))
      >>> longer(jnp.zeros((1, 200), jnp.int32)).shape
      (1, 200, 257)
    """
    aggregation = GRM(gate="uniform") if aggregation is None else aggregation
    new = nnx.merge(*nnx.split(model))
    layers = [m for _, m in nnx.iter_modules(new) if isinstance(m, MemoryCaching)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MemoryCaching layer to give caches to")
    for layer in layers:
        check_configuration(layer.memory, aggregation, segmentation)
        gates = layer.aggregation.gate
        if aggregation.needs_connector and aggregation.gate != gates:
            raise ValueError(
                f"the model was trained with gates {gates!r} and has no parameters for those of "
                f'{aggregation}; gate="uniform" needs none'
            )
        layer.aggregation, layer.segmentation = aggregation, segmentation
    for _, module in nnx.iter_modules(new):
        if isinstance(module, LanguageModel):
            mixers = tuple(
                dataclasses.replace(mixer, aggregation=aggregation, segmentation=segmentation)
                if isinstance(mixer, MemoryCachingMixer)
                else mixer
                for mixer in module.config.mixers
            )
            module.config = dataclasses.replace(module.config, mixers=mixers)
    return new
