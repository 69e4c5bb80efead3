"""RetNet of flash-linear-attention (arXiv:2307.08621)."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.memories import RetNet
from memcache_jax.nn import LanguageModelConfig
from memcache_jax.nn.recurrent import Output, Path, RecurrentMixer
from memcache_jax.pretrained.families import _fla
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    heads, features = given["num_heads"], given["hidden_size"]
    given.only(num_kv_heads=(None, heads), feature_map=(None, "relu"), use_short_conv=False)
    key_dim = int(features * given.number("expand_k", 1.0)) // heads
    value_dim = int(features * given.number("expand_v", 2.0)) // heads
    keys: dict[str, Any] = dict(activation=given.get("feature_map"), rope_base=10_000.0)
    mixer = RecurrentMixer(
        RetNet(),
        query=Path(heads, key_dim, scale=key_dim**-0.5, **keys),
        key=Path(heads, key_dim, **keys),
        value=Path(heads, value_dim),
        output=Output(
            epsilon=given.number("norm_eps", 1e-6),
            gate="silu" if given.get("use_output_gate", True) else None,
        ),
    )
    return _fla.model(given, mixer, heads, dtype=dtype, param_dtype=param_dtype)


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _fla.tensors(given)
    for names in _fla.own_layers(given):
        yield from _fla.projections(names, given.get("use_output_gate", True))
        yield names.same("attn.g_norm.weight", "mixer/output/scale")
