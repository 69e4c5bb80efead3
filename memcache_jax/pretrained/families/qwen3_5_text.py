"""Qwen3.5: gated DeltaNet, every fourth layer gated attention, dense MLPs."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import GatedMLP, LanguageModelConfig
from memcache_jax.pretrained.families import _gated_delta, _model, _qwen
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    mlp = GatedMLP(given["intermediate_size"])
    return _qwen.config(given, lambda _: mlp, dtype=dtype, param_dtype=param_dtype)


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    return _qwen.tensors(given, projections, _model.gated_mlp)


def projections(names: Names) -> Iterator[Tensor]:
    """Those of a recurrent layer's inputs."""
    of = _gated_delta
    yield from names.linear("linear_attn.in_proj_qkv", of.QUERY, of.KEY, of.VALUE)
    for letter, path in dict(z=of.GATE, b=of.RATE, a=of.DECAY).items():
        yield from names.linear(f"linear_attn.in_proj_{letter}", path)
