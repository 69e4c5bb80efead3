"""Qwen3.5 with sparse experts: gated DeltaNet, every fourth layer gated attention."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import Experts, LanguageModelConfig
from memcache_jax.pretrained.families import _model, _qwen, qwen3_5_text
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    mlp = Experts(
        given["num_experts"],
        given["num_experts_per_tok"],
        given["moe_intermediate_size"],
        given["shared_expert_intermediate_size"],
        normalize=True,
        shared_gate=True,
    )
    return _qwen.config(given, lambda _: mlp, dtype=dtype, param_dtype=param_dtype)


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""

    def mlp(names: Names) -> Iterator[Tensor]:
        yield from _model.joined_experts(names, "mlp", given["num_experts"])
        yield from _model.gated_mlp(names, "mlp.shared_expert", "mlp/shared")
        yield from names.linear("mlp.shared_expert_gate", "mlp/shared_gate")

    return _qwen.tensors(given, qwen3_5_text.projections, mlp)
