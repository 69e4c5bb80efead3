"""Qwen3-Next: gated DeltaNet, every fourth layer gated attention, sparse experts."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import Experts, GatedMLP, LanguageModelConfig
from memcache_jax.pretrained.families import _gated_delta, _model, _qwen
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""

    def mlp(layer: int) -> Experts | GatedMLP:
        if not _is_sparse(given, layer):
            return GatedMLP(given["intermediate_size"])
        return Experts(
            given["num_experts"],
            given["num_experts_per_tok"],
            given["moe_intermediate_size"],
            given["shared_expert_intermediate_size"],
            normalize=bool(given.get("norm_topk_prob", True)),
            shared_gate=True,
        )

    return _qwen.config(given, mlp, dtype=dtype, param_dtype=param_dtype)


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""

    def projections(names: Names) -> Iterator[Tensor]:
        of, heads = _gated_delta, given["linear_num_key_heads"]
        rows = of.QUERY, of.KEY, of.VALUE, of.GATE
        yield from names.linear("linear_attn.in_proj_qkvz", *rows, groups=heads)
        yield from names.linear("linear_attn.in_proj_ba", of.RATE, of.DECAY, groups=heads)

    def mlp(names: Names) -> Iterator[Tensor]:
        assert names.layer is not None
        if not _is_sparse(given, names.layer):
            yield from _model.gated_mlp(names)
            return
        yield from _model.experts(names, "mlp", given["num_experts"])
        yield from _model.gated_mlp(names, "mlp.shared_expert", "mlp/shared")
        yield from names.linear("mlp.shared_expert_gate", "mlp/shared_gate")

    return _qwen.tensors(given, projections, mlp)


def _is_sparse(given: Given, layer: int) -> bool:
    dense = layer in given.get("mlp_only_layers", []) or not given.get("num_experts", 0)
    return not dense and (layer + 1) % given.get("decoder_sparse_step", 1) == 0
