"""The hybrid of gated DeltaNet and gated attention that Qwen3-Next and Qwen3.5 share."""

from collections.abc import Callable, Iterator
from typing import Any

from memcache_jax.nn import BlockConfig, FeedForward, LanguageModelConfig, Norm
from memcache_jax.pretrained.families import _gated_delta, _model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def config(given: Given, mlp: Callable[[int], FeedForward], **options: Any) -> LanguageModelConfig:
    """The model's shape, with each layer's MLP."""
    given.only(hidden_act="silu", attn_output_gate=(None, True))
    norm = Norm(epsilon=given.number("rms_norm_eps", 1e-6), offset=1.0)
    base, fraction = given.rope(0.25)
    mixers = {
        "linear_attention": _gated_delta.mixer(
            given["linear_num_key_heads"],
            given["linear_num_value_heads"],
            given["linear_key_head_dim"],
            given["linear_value_head_dim"],
            given["linear_conv_kernel_dim"],
            epsilon=norm.epsilon,
        ),
        "full_attention": _model.attention(
            given, norm=norm, gate=True, rope_base=base, rope_fraction=fraction
        ),
    }
    blocks = [
        BlockConfig(mixers[kind], mlp(layer), norm)
        for layer, kind in enumerate(_model.layer_types(given))
    ]
    return _model.model(given, blocks, norm, given["num_attention_heads"], **options)


def tensors(
    given: Given,
    projections: Callable[[Names], Iterator[Tensor]],
    mlp: Callable[[Names], Iterator[Tensor]],
) -> Iterator[Tensor]:
    """The tensors of its files, with those of a mixer's inputs and of the MLP."""
    yield from _model.ends(given, "model.embed_tokens", "model.norm")
    for layer, kind in enumerate(_model.layer_types(given)):
        names = Names(f"model.layers.{layer}.", layer)
        yield names.same("input_layernorm.weight", "mixer_norm/scale")
        yield names.same("post_attention_layernorm.weight", "mlp_norm/scale")
        yield from mlp(names)
        if kind == "linear_attention":
            yield from projections(names)
            yield from names.conv("linear_attn.conv1d", *_gated_delta.CONVS)
            yield from _gated_delta.constants(names, "linear_attn")
            yield names.same("linear_attn.norm.weight", _gated_delta.SCALE)
            yield from names.linear("linear_attn.out_proj", _gated_delta.OUT)
        else:
            yield from _attention(given, names)


def _attention(given: Given, names: Names) -> Iterator[Tensor]:
    bias, heads = bool(given.get("attention_bias", False)), given["num_attention_heads"]
    for letter, part in dict(k="key", v="value", o="out").items():
        yield from names.linear(f"self_attn.{letter}_proj", f"mixer/{part}", bias=bias)
    # Query and gate, side by side in each head.
    both = "mixer/query", "mixer/gate"
    yield from names.linear("self_attn.q_proj", *both, bias=bias, groups=heads)
    for letter, part in dict(q="query", k="key").items():
        yield names.same(f"self_attn.{letter}_norm.weight", f"mixer/{part}_norm/scale")
