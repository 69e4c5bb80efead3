"""Conversion between ``config.model`` and a model, and the configurations of presets."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

import memcache_jax as mc
from memcache_jax._checks import check_choice, check_instance
from memcache_jax.memories import Memory
from memcache_jax.nn import (
    AttentionMixer,
    LanguageModelConfig,
    MemoryAsContextMixer,
    MemoryCachingMixer,
    Mixer,
)
from memcache_jax.training.config import Config, check_keys, default_config

# Keys that are fields of ``LanguageModelConfig``.
_MODEL = (
    *("vocab_size", "num_layers", "features", "num_heads", "head_dim", "mlp_features"),
    *("tie_embeddings", "remat", "keep_states", "offload_states"),
)
# Keys that runs of earlier versions lack.
_LATER = (
    *("keep_states", "offload_states", "connector", "distances", "bounded", "implementation"),
    "exchange",
)
# The second is a memory-caching mixer with ``states="previous"``, the third has one as its memory.
MIXERS = ("memory_caching", "previous_states", "memory_as_context", "attention", "sliding_window")
# Keys that are fields of every mixer with caches, and those of ``MemoryCachingMixer``.
_CACHES = ("start", "implementation", "exchange")
_LAYER = (*_CACHES, "connector", "distances")


def model_config(options: Config) -> LanguageModelConfig:
    """Returns the model that ``config.model`` describes.

    Looks up classes by name in ``mc.memories`` and ``mc``, so that new ones need no change here.

    Args:
      options: the ``model`` part of a configuration, as in ``default_config``.

    Raises:
      ValueError: for an unknown name, or arguments that the class does not take.
    """
    default = default_config().model
    check_keys(options, default, "model.", optional=_LATER, others=True)
    check_choice("model.dtype", options["dtype"], ("float32", "bfloat16"))
    unknown = sorted(set(options["mixers"]) - set(MIXERS))
    if unknown or not options["mixers"]:
        raise ValueError(f"model.mixers must be of {_list(MIXERS)}; got {_list(unknown)}")
    fields = {name: options[name] for name in _MODEL if name in options}
    mixers = tuple(_mixer(name, options) for name in options["mixers"])
    return LanguageModelConfig(**fields, mixers=mixers, dtype=jnp.dtype(options["dtype"]))


def model_options(model: LanguageModelConfig) -> Config:
    """Returns the ``config.model`` that describes a model: the inverse of ``model_config``.

    Raises:
      ValueError: if the mixers have different memories or attention windows.
    """
    check_instance("model", model, LanguageModelConfig, "an mc.nn.LanguageModelConfig")
    options = default_config().model
    for name in _MODEL:
        options[name] = getattr(model, name)
    options.dtype = jnp.dtype(model.dtype).name
    names = []
    for mixer in model.mixers:
        kind = "memory_caching"
        if isinstance(mixer, MemoryAsContextMixer):
            kind, mixer, context = "memory_as_context", mixer.memory, mixer
            options.window, options.rope_base = context.window, context.rope_base
        if isinstance(mixer, MemoryCachingMixer):
            names.append(kind if mixer.states == "own" else "previous_states")
            for name in _LAYER:
                options[name] = getattr(mixer, name)
            options.bounded = mixer.bounded
            for part in ("memory", "aggregation", "segmentation"):
                options[part] = _described(getattr(mixer, part))
        elif isinstance(mixer, AttentionMixer):
            names.append("sliding_window" if mixer.window else "attention")
            options.rope_base = mixer.rope_base
            options.window = mixer.window or options.window
    options.mixers = tuple(names)
    if model_config(options) != model:
        raise ValueError(f"config.model cannot describe {model}")
    return options


def _described(part: Any) -> Config:
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
    fields |= {k: _described(v) for k, v in fields.items() if isinstance(v, mc.Tree)}
    return ConfigDict({"name": type(part).__name__, **fields})


def preset_config(name: str, size: str) -> Config:
    """Returns the configuration of a preset: its model, trained as in the paper.

    Batches have half a million tokens at a context of 4096 (the tiny size has small batches at
    1024); AdamW has weight decay 0.1 and cosine decay. The caller sets ``config.data.files`` and,
    except for the tiny size, which reads bytes, ``config.data.tokenizer``, of at most 32,000 ids.
    Sizes above 170m are for several hosts, and read 32 streams.

    Args:
      name: one of ``mc.presets.NAMES``.
      size: one of ``mc.presets.SIZES``.

    Raises:
      ValueError: for an unknown name or size.
    """
    config = default_config()
    tiny = size == "tiny"
    model = mc.presets.language_model(
        name, size, vocab_size=257 if tiny else 32_000, segment=128 if tiny else 256
    )
    config.model = model_options(model)
    shape = mc.presets.SIZES[size]
    config.sequence_length, config.batch_size = (1024, 8) if tiny else (4096, 128)
    config.steps = shape.tokens // (config.sequence_length * config.batch_size)
    config.optimizer.learning_rate = shape.learning_rate
    config.optimizer.warmup_steps = 100 if tiny else 1000
    config.resume = True
    if not tiny:
        config.eval_every, config.checkpoint_every = 1000, 1000
        config.data.tokenizer = "tokenizer.json"
        config.data.streams = 1 if size == "170m" else 32
    return config


def _mixer(name: str, options: Config) -> Mixer:
    if name == "attention":
        return AttentionMixer(rope_base=options["rope_base"])
    if name == "sliding_window":
        return AttentionMixer(window=options["window"], rope_base=options["rope_base"])
    if name == "memory_as_context":
        memory = _mixer("memory_caching", options)
        return MemoryAsContextMixer(memory, options["window"], rope_base=options["rope_base"])
    return MemoryCachingMixer(
        memory=_build("memory", options, _concrete(mc.memories, Memory)),
        **caches(options),
        **{name: options[name] for name in ("connector", "distances") if name in options},
        bounded=options.get("bounded") is not False,
        states="previous" if name == "previous_states" else "own",
    )


def caches(options: Config) -> dict[str, Any]:
    """What ``config.model`` says of caches: arguments of every mixer that has some."""
    return dict(
        aggregation=_build("aggregation", options, _concrete(mc, mc.Aggregation)),
        segmentation=_build("segmentation", options, _concrete(mc, mc.Segmentation)),
        **{name: options[name] for name in _CACHES if name in options},
    )


def _concrete(module: Any, base: type) -> dict[str, type]:
    classes = {k: v for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, base)}
    return {name: cls for name, cls in classes.items() if not inspect.isabstract(cls)}


def _build(key: str, options: Any, classes: Mapping[str, type]) -> Any:
    arguments = dict(options[key])
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"model.{key}.name must be one of {_list(classes)}; got {name!r}")
    known = [field.name for field in dataclasses.fields(classes[name]) if field.init]
    if unknown := set(arguments) - set(known):
        raise ValueError(
            f"model.{key}: {name} has the arguments {_list(known)}; got {_list(unknown)}"
        )
    for part, value in arguments.items():
        if isinstance(value, list):  # JSON has lists, but the classes must be hashable
            arguments[part] = tuple(value)
        elif isinstance(value, (dict, ConfigDict)):
            arguments[part] = _build(part, {part: value}, {"Tree": mc.Tree})
    try:
        return classes[name](**arguments)
    except TypeError as e:
        raise ValueError(f"model.{key}: cannot make {name} with {arguments}: {e}") from e


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
