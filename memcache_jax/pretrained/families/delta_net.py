"""DeltaNet of flash-linear-attention (arXiv:2406.06484)."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.memories import DeltaNet
from memcache_jax.nn import LanguageModelConfig
from memcache_jax.nn.recurrent import Output, Path, Rate, RecurrentMixer
from memcache_jax.pretrained.families import _fla
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    given.only(use_beta=True, use_output_norm=True, qk_activation="silu", qk_norm=("l2", "sum"))
    heads, features = given["num_heads"], given["hidden_size"]
    key_dim = int(features * given.number("expand_k", 1.0)) // heads
    value_dim = int(features * given.number("expand_v", 1.0)) // heads
    conv: dict[str, Any] = _fla.conv_options(given) or dict(activation="silu")
    keys: dict[str, Any] = conv | dict(norm=given.get("qk_norm", "l2"))
    mixer = RecurrentMixer(
        DeltaNet(),
        query=Path(heads, key_dim, scale=key_dim**-0.5, **keys),
        key=Path(heads, key_dim, **keys),
        value=Path(heads, value_dim, **conv),
        coefficients=(Rate(scale=2.0 if given.get("allow_neg_eigval", False) else 1.0),),
        output=Output(
            epsilon=given.number("norm_eps", 1e-6),
            gate="silu" if given.get("use_gate", False) else None,
        ),
    )
    return _fla.model(given, mixer, heads, dtype=dtype, param_dtype=param_dtype)


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _fla.tensors(given)
    for names in _fla.own_layers(given):
        gate = given.get("use_gate", False)
        yield from _fla.projections(names, gate, b="coefficients/0/linear")
        yield names.same("attn.o_norm.weight", "mixer/output/scale")
        yield from _fla.convolutions(given, names)
