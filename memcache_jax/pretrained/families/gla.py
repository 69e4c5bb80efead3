"""Gated linear attention of flash-linear-attention (arXiv:2312.06635)."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.memories import GLA
from memcache_jax.nn import LanguageModelConfig
from memcache_jax.nn.recurrent import LowRank, LowRankDecay, Output, Path, RecurrentMixer
from memcache_jax.pretrained.families import _fla
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    heads, features = given["num_heads"], given["hidden_size"]
    given.only(use_gk=True, use_gv=False, num_kv_heads=(None, heads), feature_map=(None, "relu"))
    key_dim = int(features * given.number("expand_k", 0.5)) // heads
    value_dim = int(features * given.number("expand_v", 1.0)) // heads
    conv = _fla.conv_options(given, default=False)
    keys: dict[str, Any] = conv | dict(activation=given.get("feature_map"))
    least = given.get("clamp_min")
    mixer = RecurrentMixer(
        GLA(),
        query=Path(heads, key_dim, scale=key_dim**-0.5, **keys),
        key=Path(heads, key_dim, **keys),
        value=Path(heads, value_dim, **conv),
        coefficients=(LowRankDecay(LowRank(16), least=None if least is None else float(least)),),
        output=Output(
            epsilon=given.number("norm_eps", 1e-6),
            gate="silu" if given.get("use_output_gate", True) else None,
        ),
    )
    return _fla.model(given, mixer, heads, dtype=dtype, param_dtype=param_dtype)


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _fla.tensors(given)
    decay = "mixer/coefficients/0"
    for names in _fla.own_layers(given):
        yield from _fla.projections(names, given.get("use_output_gate", True))
        yield from names.linear("attn.gk_proj.0", f"{decay}/low/down")
        yield from names.linear("attn.gk_proj.1", f"{decay}/low/up", bias=True)
        yield names.same("attn.g_norm.weight", "mixer/output/scale")
        if given.get("use_short_conv", False):
            yield from _fla.convolutions(given, names)
