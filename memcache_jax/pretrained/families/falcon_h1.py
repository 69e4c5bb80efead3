"""Falcon-H1 (arXiv:2507.22448): Mamba-2 and attention side by side in each block, multipliers."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import BlockConfig, GatedMLP, LanguageModelConfig, Norm, ParallelMixer
from memcache_jax.pretrained.families import _mamba, _model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    given.only(hidden_act="silu", mamba_proj_bias=False, attention_bias=False)
    norm = Norm(epsilon=given.number("rms_norm_eps", 1e-5))
    inner = given.values.get("mamba_d_ssm", 1024)  # null asks for the expanded channels
    if inner is None:
        inner = given.get("mamba_expand", 2) * given["hidden_size"]
    heads, dim = _mamba.sizes(given, inner)
    groups, into = given.get("mamba_n_groups", 1), given.number("ssm_in_multiplier", 1.0)
    mamba = _mamba.mixer(
        heads,
        dim,
        groups,
        given.get("mamba_d_state", 256),
        given.get("mamba_d_conv", 4),
        limits=given.numbers("time_step_limit", (0.0, "inf")),
        epsilon=norm.epsilon,
        conv_bias=given.get("mamba_conv_bias", True),
        scales=tuple(into * scale for scale in given.numbers("ssm_multipliers", (1.0,) * 5)),
        norm_groups=groups if given.get("mamba_rms_norm", False) else None,
        gate_first=not given.get("mamba_norm_before_gate", True),
        use_bias=bool(given.get("projectors_bias", False)),
    )
    # Without biases, factors of its inputs are factors of scores and of its output.
    into, of_keys = given.number("attention_in_multiplier", 1.0), given.number("key_multiplier", 1)
    head_dim = given.get("head_dim", given["hidden_size"] // given["num_attention_heads"])
    attention = _model.attention(
        _mamba.with_defaults(given),
        rope_base=given.rope()[0],
        scale=into**2 * of_keys * head_dim**-0.5,
    )
    mixer = ParallelMixer(
        mamba,
        attention,
        given.number("ssm_out_multiplier", 1.0),
        into * given.number("attention_out_multiplier", 1.0),
    )
    of_gate, of_mlp = given.numbers("mlp_multipliers", (1.0, 1.0))
    mlp = GatedMLP(given["intermediate_size"], bool(given.get("mlp_bias", False)), of_gate, of_mlp)
    return _model.model(
        given,
        [BlockConfig(mixer, mlp, norm)] * given["num_hidden_layers"],
        norm,
        given["num_attention_heads"],
        embedding_scale=given.number("embedding_multiplier", 1.0),
        logit_scale=given.number("lm_head_multiplier", 1.0),
        dtype=dtype,
        param_dtype=param_dtype,
    )


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _model.ends(given, "model.embed_tokens", "model.final_layernorm")
    for layer in range(given["num_hidden_layers"]):
        names = Names(f"model.layers.{layer}.", layer)
        yield names.same("input_layernorm.weight", "mixer_norm/scale")
        yield names.same("pre_ff_layernorm.weight", "mlp_norm/scale")
        yield from _mamba.tensors(
            names,
            "mamba",
            given.get("mamba_conv_bias", True),
            path="mixer/left",
            norm=given.get("mamba_rms_norm", False),
            out_bias=bool(given.get("projectors_bias", False)),
        )
        yield from _model.attention_tensors(names, "self_attn", given, "mixer/right")
        bias = bool(given.get("mlp_bias", False))
        yield from _model.gated_mlp(names, "feed_forward", bias=bias)
