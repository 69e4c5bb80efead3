"""Gated DeltaNet of flash-linear-attention."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import LanguageModelConfig
from memcache_jax.pretrained.families import _fla, _gated_delta
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    given.only(output_gate_activation=("swish", "silu", "sigmoid"))
    heads, dim = given["num_heads"], given["head_dim"]
    gate = dict(swish="silu").get(given.get("output_gate_activation", "swish"), "sigmoid")
    mixer = _gated_delta.mixer(
        heads,
        given.get("num_v_heads", heads),
        dim,
        int(dim * given.number("expand_v", 2)),
        given.get("conv_size", 4) if given.get("use_short_conv", True) else None,
        epsilon=given.number("norm_eps", 1e-6),
        rate=2.0 if given.get("allow_neg_eigval", False) else 1.0,
        gate=gate if given.get("use_gate", True) else None,
        conv_bias=bool(given.get("conv_bias", False)),
    )
    return _fla.model(given, mixer, heads, dtype=dtype, param_dtype=param_dtype)


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _fla.tensors(given)
    for names in _fla.own_layers(given):
        yield from _gated_delta.separate(names, "attn", gate=given.get("use_gate", True))
        yield from _fla.convolutions(given, names)
