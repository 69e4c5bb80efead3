"""Mamba-2 (arXiv:2405.21060)."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import BlockConfig, LanguageModelConfig, Norm
from memcache_jax.pretrained.families import _mamba, _model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    given.only(hidden_act="silu")
    epsilon = given.number("layer_norm_epsilon", 1e-5)
    mixer = _mamba.mixer(
        given["num_heads"],
        given["head_dim"],
        given["n_groups"],
        given["state_size"],
        given["conv_kernel"],
        limits=given.numbers("time_step_limit", (0.0, "inf")),
        epsilon=epsilon,
        conv_bias=given.get("use_conv_bias", True),
        bias=bool(given.get("use_bias", False)),
    )
    norm = Norm(epsilon=epsilon)
    blocks = [BlockConfig(mixer, None, norm)] * given["num_hidden_layers"]
    heads = given["num_heads"]
    return _model.model(given, blocks, norm, heads, dtype=dtype, param_dtype=param_dtype)


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _model.ends(given, "backbone.embeddings", "backbone.norm_f")
    for layer in range(given["num_hidden_layers"]):
        names = Names(f"backbone.layers.{layer}.", layer)
        yield names.same("norm.weight", "mixer_norm/scale")
        of_conv, bias = given.get("use_conv_bias", True), bool(given.get("use_bias", False))
        yield from _mamba.tensors(names, "mixer", of_conv, bias=bias)
