"""Bamba: Mamba-2 layers and attention layers with rotary positions in half of their channels."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import BlockConfig, GatedMLP, LanguageModelConfig, Norm
from memcache_jax.pretrained.families import _mamba, _model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    given.only(hidden_act="silu")
    norm = Norm(epsilon=given.number("rms_norm_eps", 1e-5))
    base, _ = given.rope()
    part = given.get("rope_parameters", {}).get("partial_rotary_factor", 0.5)
    heads, dim = _mamba.sizes(given, given.get("mamba_expand", 2) * given["hidden_size"])
    mixers = [
        _mamba.mixer(
            heads,
            dim,
            given.get("mamba_n_groups", 1),
            given.get("mamba_d_state", 256),
            given.get("mamba_d_conv", 4),
            limits=given.numbers("time_step_limit", (0.0, "inf")),
            epsilon=norm.epsilon,
            conv_bias=given.get("mamba_conv_bias", True),
            bias=bool(given.get("mamba_proj_bias", False)),
        ),
        _model.attention(_mamba.with_defaults(given), rope_base=base, rope_fraction=part),
    ]
    mlp = GatedMLP(given["intermediate_size"], bool(given.get("mlp_bias", False)))
    blocks = [BlockConfig(mixers[attends], mlp, norm) for attends in _attends(given)]
    heads = given["num_attention_heads"]
    return _model.model(given, blocks, norm, heads, dtype=dtype, param_dtype=param_dtype)


def _attends(given: Given) -> list[bool]:
    """Whether each layer mixes tokens by attention."""
    layers = given.get("attn_layer_indices", [])
    return [layer in layers for layer in range(given["num_hidden_layers"])]


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _model.ends(given, "model.embed_tokens", "model.final_layernorm")
    for layer, attends in enumerate(_attends(given)):
        names = Names(f"model.layers.{layer}.", layer)
        yield names.same("input_layernorm.weight", "mixer_norm/scale")
        yield names.same("pre_ff_layernorm.weight", "mlp_norm/scale")
        if attends:
            yield from _model.attention_tensors(names, "self_attn", given)
        else:
            of_conv = given.get("mamba_conv_bias", True)
            bias = bool(given.get("mamba_proj_bias", False))
            yield from _mamba.tensors(names, "mamba", of_conv, bias=bias)
        bias = bool(given.get("mlp_bias", False))
        yield from _model.gated_mlp(names, "feed_forward", bias=bias)
