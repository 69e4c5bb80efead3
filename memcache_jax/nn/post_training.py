"""Memory caching for a model trained without it."""

import dataclasses
from typing import Any, TypeVar

from flax import nnx

from memcache_jax.aggregation import GRM, Aggregation
from memcache_jax.caching import check_configuration
from memcache_jax.nn.block import Block
from memcache_jax.nn.config import MemoryCachingMixer, Mixer
from memcache_jax.nn.language_model import LanguageModel, abstract_model
from memcache_jax.nn.memory_layer import MemoryLayer
from memcache_jax.nn.parallel import changed
from memcache_jax.nn.recurrent import Recurrent, RecurrentMixer
from memcache_jax.nn.tuning import grown
from memcache_jax.segmentation import Segmentation
from memcache_jax.sparse import SSC

Model = TypeVar("Model", bound=nnx.Module)


def with_memory_caching(
    model: Model,
    *,
    segmentation: Segmentation,
    aggregation: Aggregation | None = None,
) -> Model:
    """Adds caches to an already trained recurrent model.

    Post-training memory caching (Sec. 4.3 of arXiv:2602.24281): on inputs longer than its training
    length, a recurrent model caches its memory after every training length and reads all of them
    with equal weight. Every ``MemoryCaching`` layer of the model gets the new aggregation and
    segmentation.

    Args:
      model: any NNX module with ``MemoryCaching`` layers, such as a ``LanguageModel``.
      segmentation: where states are cached: ``Constant`` of the model's training length.
      aggregation: ``GRM(gate="uniform")`` by default. ``Soup(gate="uniform")`` and ``Residual``
        need no parameters either. Content gates are for layers that have a connector, and for
        language models of ``Recurrent`` layers, which get one: it is zero, and so the gates are
        uniform until it is trained.

    Returns:
      A new model with the same parameter arrays. The given model is unchanged.

    Raises:
      ValueError: for a model without such layers, a segment size that a memory's chunk size does
        not divide, or an aggregation whose gates need parameters that the layers lack.

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
    layers = [m for _, m in nnx.iter_modules(new) if isinstance(m, MemoryLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer of memory caching")
    for layer in layers:
        check_configuration(layer.memory, aggregation, segmentation)
        trained = layer.aggregation
        wanted = aggregation.relevance.connector
        can_get = (
            wanted == "key" and isinstance(layer, Recurrent) and isinstance(new, LanguageModel)
        )
        if wanted not in (None, trained.relevance.connector) and not can_get:
            raise ValueError(
                f"the model was trained with gate={trained.gate!r} and lacks the parameters for "
                f'{aggregation}; gate="uniform" needs none'
            )
        if getattr(layer, "states", "own") == "previous":
            _check_reads(layer, aggregation)
        layer.aggregation, layer.segmentation = aggregation, segmentation

    def cached(mixer: Mixer) -> Mixer:
        if not isinstance(mixer, MemoryCachingMixer | RecurrentMixer):
            return mixer
        return dataclasses.replace(mixer, aggregation=aggregation, segmentation=segmentation)

    for _, module in nnx.iter_modules(new):
        if isinstance(module, LanguageModel):
            module.config = module.config.with_mixers(cached)
        elif isinstance(module, Block):
            mixer = changed(module.config.mixer, cached)
            module.config = dataclasses.replace(module.config, mixer=mixer)
    if not isinstance(new, LanguageModel):
        return new
    there = {tuple(path) for path, _ in nnx.to_flat_state(nnx.state(new, nnx.Param))}
    wanted = {tuple(path) for path, _ in nnx.to_flat_state(abstract_model(new.config)[1])}
    # New connectors are zero, whatever the key.
    return new if wanted <= there else grown(new, new.config, nnx.Rngs(0))


def _check_reads(layer: Any, aggregation: Aggregation) -> None:
    """Raises ValueError unless a layer with ``states="previous"`` can read states so."""
    if layer.follows:
        fits, wanted = type(aggregation) is SSC, "connector='previous', which needs SSC"
    else:
        fits = not aggregation.merges_exactly(layer.memory)
        wanted = "states='previous', which needs gates that tell states apart, such as GRM()"
    if not fits:
        raise ValueError(f"the model has layers with {wanted}; got {aggregation}")
