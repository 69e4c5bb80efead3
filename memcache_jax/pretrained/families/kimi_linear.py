"""Kimi Linear (arXiv:2510.26692): KDA and latent attention, sparse experts with a shared one."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from memcache_jax.memories import KDA
from memcache_jax.nn import (
    BlockConfig,
    Experts,
    GatedMLP,
    LanguageModelConfig,
    LatentAttentionMixer,
    Norm,
)
from memcache_jax.nn.recurrent import LowRank, Output, Path, Rate, RecurrentMixer, TimeStepDecay
from memcache_jax.pretrained.families import _model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    given = _by_one_name(given)
    heads = given["num_attention_heads"]
    given.only(hidden_act="silu", num_key_value_heads=(None, heads))
    norm = Norm(epsilon=given.number("rms_norm_eps", 1e-5))
    mixers = {"linear_attention": _delta(given, norm.epsilon), "full_attention": _latent(given)}
    hidden = given["moe_intermediate_size"]
    mlps = {
        "dense": GatedMLP(given["intermediate_size"]),
        "sparse": Experts(
            given["num_experts"],
            given["num_experts_per_token"],
            hidden,
            hidden * given.get("num_shared_experts", 1) or None,
            probabilities="sigmoid",
            normalize=given.get("moe_renormalize", True),
            scale=given.number("routed_scaling_factor", 2.446),
            selection_bias=True,
            groups=given.get("num_expert_group", 1),
            top_groups=given.get("topk_group", 1),
        ),
    }
    blocks = [
        BlockConfig(_chosen(given, mixers, kind), _chosen(given, mlps, of_mlp), norm)
        for kind, of_mlp in _layers(given)
    ]
    given = given.replaced(tie_word_embeddings=False)  # its library ties none
    return _model.model(given, blocks, norm, heads, dtype=dtype, param_dtype=param_dtype)


def _by_one_name(given: Given) -> Given:
    """With the published names of what transformers has other names for too."""
    names = dict(
        n_group="num_expert_group",
        norm_topk_prob="moe_renormalize",
        n_shared_experts="num_shared_experts",
        num_experts_per_tok="num_experts_per_token",
        num_local_experts="num_experts",
    )
    there = {new: given.values[old] for old, new in names.items() if old in given.values}
    return given.replaced(**{**there, **given.values})


def _chosen(given: Given, among: dict[str, Any], kind: str) -> Any:
    if kind not in among:
        raise ValueError(f"{given.where}: a layer of {kind!r} is not supported, only {list(among)}")
    return among[kind]


def _linear(given: Given, name: str, inside: str, default: int) -> int:
    """A size of the linear attention, which older files have in an object of their own."""
    return given.get("linear_attn_config", {}).get(inside, given.get(name, default))


def _layers(given: Given) -> list[tuple[str, str]]:
    """What each layer mixes tokens by, and its MLP."""
    count, older = given["num_hidden_layers"], given.get("linear_attn_config", {})
    kinds = given.get("layer_types")
    if kinds is None:  # layers are counted from one
        attention = older.get("full_attn_layers", range(5, count + 1, 4))
        names = "linear_attention", "full_attention"
        kinds = [names[layer + 1 in attention] for layer in range(count)]
    mlps = given.get("mlp_layer_types")
    if mlps is None:
        dense = given.get("first_k_dense_replace", 1)
        mlps = ["dense" if layer < dense else "sparse" for layer in range(count)]
    return list(zip(kinds, mlps, strict=True))


def _delta(given: Given, epsilon: float) -> RecurrentMixer:
    heads = _linear(given, "linear_num_heads", "num_heads", 32)
    dim = _linear(given, "linear_head_dim", "head_dim", 128)
    conv: dict[str, Any] = dict(
        conv_width=_linear(given, "linear_conv_kernel_dim", "short_conv_kernel_size", 4)
    )
    low = LowRank(dim, use_bias=False)
    return RecurrentMixer(
        KDA(),
        query=Path(heads, dim, norm="l2", scale=dim**-0.5, **conv),
        key=Path(heads, dim, norm="l2", **conv),
        value=Path(heads, dim, **conv),
        coefficients=(TimeStepDecay(low), Rate()),
        output=Output(epsilon=epsilon, gate="sigmoid", gate_low=low),
    )


def _latent(given: Given) -> LatentAttentionMixer:
    return LatentAttentionMixer(
        given["num_attention_heads"],
        key_dim=given["qk_nope_head_dim"],
        shared_dim=given["qk_rope_head_dim"],
        value_dim=given["v_head_dim"],
        rank=given["kv_lora_rank"],
        query_rank=given.get("q_lora_rank"),
        use_bias=bool(given.get("attention_bias", False)),
    )


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    given = _by_one_name(given)
    untied = given.replaced(tie_word_embeddings=False)
    yield from _model.ends(untied, "model.embed_tokens", "model.norm")
    for layer, (kind, of_mlp) in enumerate(_layers(given)):
        names = Names(f"model.layers.{layer}.", layer)
        yield names.same("input_layernorm.weight", "mixer_norm/scale")
        yield names.same("post_attention_layernorm.weight", "mlp_norm/scale")
        yield from (_delta_tensors if kind == "linear_attention" else _latent_tensors)(given, names)
        if of_mlp == "dense":
            for tensor in _model.gated_mlp(names, "block_sparse_moe"):  # as transformers saves it
                (name,) = tensor.names
                published = name.replace("block_sparse_moe", "mlp")
                yield dataclasses.replace(tensor, others=(published,))
        else:
            where = "block_sparse_moe"
            yield from _model.experts(names, where, given["num_experts"], ("w1", "w3", "w2"))
            yield names.same(f"{where}.gate.e_score_correction_bias", "mlp/selection_bias")
            if given.get("num_shared_experts", 1):
                yield from _model.gated_mlp(names, f"{where}.shared_experts", "mlp/shared")


def _delta_tensors(given: Given, names: Names) -> Iterator[Tensor]:
    decay, rate = "mixer/coefficients/0", "mixer/coefficients/1"
    for letter, path in dict(q="query", k="key", v="value").items():
        yield from names.linear(f"self_attn.{letter}_proj", f"mixer/{path}/linear")
        yield from names.conv(f"self_attn.{letter}_conv1d", f"mixer/{path}/conv")
    for letter, path in dict(f=f"{decay}/low", g="mixer/output/gate").items():
        yield from names.linear(f"self_attn.{letter}_a_proj", f"{path}/down")
        yield from names.linear(f"self_attn.{letter}_b_proj", f"{path}/up")
    yield from names.linear("self_attn.b_proj", f"{rate}/linear")
    yield names.same("self_attn.A_log", f"{decay}/A_log", shape=(1, 1, -1, 1))
    yield names.same("self_attn.dt_bias", f"{decay}/dt_bias")
    yield names.same("self_attn.o_norm.weight", "mixer/output/scale")
    yield from names.linear("self_attn.o_proj", "mixer/output/out")


def _latent_tensors(given: Given, names: Names) -> Iterator[Tensor]:
    bias = bool(given.get("attention_bias", False))
    if given.get("q_lora_rank") is None:
        yield from names.linear("self_attn.q_proj", "mixer/query")
    else:
        yield from names.linear("self_attn.q_a_proj", "mixer/query_down", bias=bias)
        yield from names.norm("self_attn.q_a_layernorm", "mixer/query_norm")
        yield from names.linear("self_attn.q_b_proj", "mixer/query")
    yield from names.linear("self_attn.kv_a_proj_with_mqa", "mixer/down", bias=bias)
    yield from names.norm("self_attn.kv_a_layernorm", "mixer/norm")
    yield from names.linear("self_attn.kv_b_proj", "mixer/up")
    yield from names.linear("self_attn.o_proj", "mixer/out", bias=bias)
