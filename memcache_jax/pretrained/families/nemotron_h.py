"""Nemotron-H (arXiv:2504.03624): Mamba-2 layers, attention layers and MLP layers in one list."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import BlockConfig, LanguageModelConfig, Norm, SquaredMLP
from memcache_jax.pretrained.families import _mamba, _model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    given.only(
        mamba_hidden_act="silu",
        mlp_hidden_act="relu2",
        sliding_window=None,
    )
    norm = Norm(epsilon=given.number("layer_norm_epsilon", 1e-5))
    mixers = {
        "linear_attention": _mamba.mixer(
            given["mamba_num_heads"],
            given["mamba_head_dim"],
            given["n_groups"],
            given["ssm_state_size"],
            given["conv_kernel"],
            # What the configuration calls time_step_limit has no effect.
            limits=(given.number("time_step_min", 0.001), float("inf")),
            epsilon=norm.epsilon,
            conv_bias=given.get("use_conv_bias", True),
            bias=bool(given.get("use_bias", False)),
        ),
        "full_attention": _model.attention(_bare(given), rope_base=None),
    }
    mlp = SquaredMLP(given["intermediate_size"], bool(given.get("mlp_bias", False)))
    blocks = [
        BlockConfig(mixers[kind], None if of_mlp is None else mlp, norm)
        for _, kind, of_mlp in _pairs(given)
    ]
    heads = given["num_attention_heads"]
    return _model.model(_bare(given), blocks, norm, heads, dtype=dtype, param_dtype=param_dtype)


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _model.ends(_bare(given), "backbone.embeddings", "backbone.norm_f")
    for block, (layer, kind, of_mlp) in enumerate(_pairs(given)):
        names = Names(f"backbone.layers.{layer}.", block)
        yield names.same("norm.weight", "mixer_norm/scale")
        if kind == "linear_attention":
            of_conv, bias = given.get("use_conv_bias", True), bool(given.get("use_bias", False))
            yield from _mamba.tensors(names, "mixer", of_conv, bias=bias)
        else:
            yield from _model.attention_tensors(names, "mixer", _bare(given))
        if of_mlp is not None:
            names = Names(f"backbone.layers.{of_mlp}.", block)
            yield names.same("norm.weight", "mlp_norm/scale")
            bias = bool(given.get("mlp_bias", False))
            yield from names.linear("mixer.up_proj", "mlp/up", bias=bias)
            yield from names.linear("mixer.down_proj", "mlp/down", bias=bias)


def _bare(given: Given) -> Given:
    """Its attention has no biases and its head is its own, whatever the configuration says."""
    sizes = dict(head_dim=given.get("head_dim", 128))
    return given.replaced(attention_bias=False, tie_word_embeddings=False, **sizes)


def _pairs(given: Given) -> list[tuple[int, str, int | None]]:
    """The layers that mix tokens, each with the MLP layer after it, if there is one."""
    kinds = list(given["layers_block_type"])
    found: list[tuple[int, str, int | None]] = []
    for layer, kind in enumerate(kinds):
        if kind in ("linear_attention", "full_attention"):
            after = layer + 1 < len(kinds) and kinds[layer + 1] == "mlp"
            found.append((layer, kind, layer + 1 if after else None))
        elif kind != "mlp" or not layer or kinds[layer - 1] == "mlp":
            raise ValueError(
                f"{given.where}: layer {layer} of layers_block_type is {kind!r}, served are "
                "linear_attention, full_attention, and mlp after one of these"
            )
    return found
