"""OLMo-hybrid: gated DeltaNet with beta in [0, 2], every fourth layer attention with norms last."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import BlockConfig, GatedMLP, LanguageModelConfig, Norm
from memcache_jax.pretrained.families import _gated_delta, _model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Part, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    given.only(hidden_act="silu")
    norm = Norm(epsilon=given.number("rms_norm_eps", 1e-6))
    linear = _gated_delta.mixer(
        given["linear_num_key_heads"],
        given["linear_num_value_heads"],
        given["linear_key_head_dim"],
        given["linear_value_head_dim"],
        given["linear_conv_kernel_dim"],
        epsilon=1e-5,  # whatever the configuration says
        rate=2.0 if given.get("linear_allow_neg_eigval", True) else 1.0,
    )
    full = _model.attention(given, norm=norm, norm_over="all", rope_base=_rope_base(given))
    mlp = GatedMLP(given["intermediate_size"])
    blocks = [
        BlockConfig(linear, mlp, norm)
        if kind == "linear_attention"
        else BlockConfig(full, mlp, norm, norm_last=True)
        for kind in _model.layer_types(given)
    ]
    heads = given["num_attention_heads"]
    return _model.model(given, blocks, norm, heads, dtype=dtype, param_dtype=param_dtype)


def _rope_base(given: Given) -> float | None:
    """The base of rotary positions; published models have none, which their files say by a null."""
    said = {**given.values, **given.get("rope_parameters", {})}
    return None if said.get("rope_theta", 0) is None else given.rope()[0]


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _model.ends(given, "model.embed_tokens", "model.norm")
    for layer, kind in enumerate(_model.layer_types(given)):
        names = Names(f"model.layers.{layer}.", layer)
        yield from _model.gated_mlp(names)
        if kind == "linear_attention":
            yield names.same("attention_layer_norm.weight", "mixer_norm/scale")
            yield names.same("feedforward_layer_norm.weight", "mlp_norm/scale")
            yield from _gated_delta.separate(names, "linear_attn")
            # Thirds of one convolution, wherever the projections end.
            files = (f"{names.prefix}linear_attn.{letter}_conv1d.weight" for letter in "qkv")
            parts = (Part(f"{path}/kernel", "conv") for path in _gated_delta.CONVS)
            yield Tensor(tuple(files), tuple(parts), layer)
        else:
            # The file's name for the norm after attention.
            yield names.same("feedforward_layer_norm.weight", "mixer_norm/scale")
            yield names.same("post_feedforward_layernorm.weight", "mlp_norm/scale")
            yield from _model.attention_tensors(names, "self_attn", given)
            for letter, part in dict(q="query", k="key").items():
                yield names.same(f"self_attn.{letter}_norm.weight", f"mixer/{part}_norm/scale")
