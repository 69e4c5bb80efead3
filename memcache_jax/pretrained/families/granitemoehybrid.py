"""Granite 4: Mamba-2 layers and attention layers, sparse experts with a shared one, multipliers."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import BlockConfig, Experts, GatedMLP, LanguageModelConfig, Norm
from memcache_jax.pretrained.families import _mamba, _model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Part, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    given.only(hidden_act="silu", position_embedding_type=(None, "rope", "nope"))
    norm = Norm(epsilon=given.number("rms_norm_eps", 1e-6))
    rope = given.get("position_embedding_type") == "rope"
    heads, dim = _mamba.sizes(given, given.get("mamba_expand", 2) * given["hidden_size"])
    mixers = {
        "linear_attention": _mamba.mixer(
            heads,
            dim,
            given["mamba_n_groups"],
            given["mamba_d_state"],
            given["mamba_d_conv"],
            limits=given.numbers("time_step_limit", (0.0, "inf")),
            epsilon=norm.epsilon,
            conv_bias=given.get("mamba_conv_bias", True),
            bias=bool(given.get("mamba_proj_bias", False)),
        ),
        "full_attention": _model.attention(
            given,
            scale=given.number("attention_multiplier", 1.0),
            rope_base=given.rope()[0] if rope else None,
        ),
    }
    scale = given.number("residual_multiplier", 1.0)
    shared, count = given["shared_intermediate_size"], given.get("num_local_experts", 0)
    mlp = GatedMLP(shared)
    if count:
        hidden, top_k = given["intermediate_size"], given["num_experts_per_tok"]
        mlp = Experts(count, top_k, hidden, shared, probabilities="top")
    blocks = [
        BlockConfig(mixers[_kind(kind)], mlp, norm, residual_scale=scale)
        for kind in _model.layer_types(given)
    ]
    options = dict(
        embedding_scale=given.number("embedding_multiplier", 1.0),
        logit_scale=1 / given.number("logits_scaling", 1.0),
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return _model.model(given, blocks, norm, given["num_attention_heads"], **options)


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _model.ends(given, "model.embed_tokens", "model.norm")
    sparse = bool(given.get("num_local_experts", 0))
    for layer, kind in enumerate(_model.layer_types(given)):
        names = Names(f"model.layers.{layer}.", layer)
        yield names.same("input_layernorm.weight", "mixer_norm/scale")
        yield names.same("post_attention_layernorm.weight", "mlp_norm/scale")
        if _kind(kind) == "linear_attention":
            of_conv = given.get("mamba_conv_bias", True)
            bias = bool(given.get("mamba_proj_bias", False))
            yield from _mamba.tensors(names, "mamba", of_conv, bias=bias)
        else:
            yield from _model.attention_tensors(names, "self_attn", given)
        path = "mlp/shared" if sparse else "mlp"
        yield from names.linear("shared_mlp.input_linear", f"{path}/gate", f"{path}/up")
        yield from names.linear("shared_mlp.output_linear", f"{path}/down")
        if sparse:
            yield from names.linear("block_sparse_moe.router.layer", "mlp/router")
            parts = (Part(f"mlp/{part}", "matrix") for part in ("gate", "up"))
            yield names.tensor("block_sparse_moe.input_linear.weight", *parts, axis=1)
            down = Part("mlp/down", "matrix")
            yield names.tensor("block_sparse_moe.output_linear.weight", down)


def _kind(name: str) -> str:
    """What a layer mixes tokens by: the library has had two names for it."""
    return dict(mamba="linear_attention", attention="full_attention").get(name, name)
