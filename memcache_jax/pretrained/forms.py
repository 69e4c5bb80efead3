"""Configurations as they are published, in the form in which transformers saves a text model."""

from pathlib import Path
from typing import Any

from memcache_jax.pretrained.given import Given, read_given

TEXT_OF = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""The text model of each model of text and images, by their ``model_type``."""

SKIPPED = {
    "nemotron_h": ("mtp.",),
    "qwen3_5_moe_text": ("model.visual.", "mtp."),
    "qwen3_5_text": ("model.visual.", "mtp."),
    "qwen3_next": ("mtp.",),
}
"""What the names of tensors begin with that a family's files may have beside the text model: its
vision tower, and the layers that predict several tokens at once."""

RENAMED = {
    "mamba2": {"backbone.embedding.": "backbone.embeddings."},
    "qwen3_5_moe_text": {"model.language_model.": "model."},
    "qwen3_5_text": {"model.language_model.": "model."},
}
"""Beginnings of tensors' names as published, and those that a saved text model has."""

_OLDER_LAYERS = {"mamba": "linear_attention", "attention": "full_attention"}
_NEMOTRON_LAYERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_NEMOTRON_NAMES = {
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "time_step_min": "mamba_dt_min",
    "use_conv_bias": "mamba_conv_bias",
}


def read_text_model(folder: Path) -> Given:
    """Returns the configuration of a folder's text model.

    Raises:
      ValueError: if there is none, or it is none of a served one.
    """
    return text_model(read_given(folder))


def text_model(given: Given) -> Given:
    """The text model of a configuration, by the names that families know.

    Raises:
      ValueError: for a configuration that lacks its text model, or is none of a served one.
    """
    if "model_type" not in given.values and "ssm_cfg" in given.values:
        return _state_spaces(given)
    kind = given["model_type"]
    if isinstance(kind, str) and kind in TEXT_OF:
        given = _nested(given, TEXT_OF[kind])
    return _nemotron_h(given) if kind == "nemotron_h" else given


def _nested(given: Given, kind: str) -> Given:
    """The text model inside a model of text and images, whose files tie what the whole one ties."""
    inner = given["text_config"]
    if not isinstance(inner, dict):
        raise ValueError(f"{given.where}: text_config must be an object, got {inner!r:.100}")
    names = "dtype", "torch_dtype", "quantization_config", "transformers_version"
    outer = {name: given.values[name] for name in names if name in given.values}
    class_name = {"qwen3_5_text": "Qwen3_5ForCausalLM"}.get(kind, "Qwen3_5MoeForCausalLM")
    own: dict[str, Any] = dict(model_type=kind, architectures=[class_name])
    if "tie_word_embeddings" in given.values:
        own["tie_word_embeddings"] = given.values["tie_word_embeddings"]
    return Given({**outer, **inner, **own}, given.where)


def _nemotron_h(given: Given) -> Given:
    """Nemotron-H with the layers that a pattern of letters names, and the names of older files."""
    found = dict(given.values)
    for name, older in _NEMOTRON_NAMES.items():
        if older in found:
            found[name] = found.pop(older)
    pattern = found.pop("hybrid_override_pattern", None)
    if found.get("layers_block_type") is None and pattern is not None:
        unknown = sorted(set(pattern) - set(_NEMOTRON_LAYERS))
        if unknown:
            raise ValueError(
                f"{given.where}: hybrid_override_pattern={pattern!r} has {', '.join(unknown)}, "
                f"known are {', '.join(_NEMOTRON_LAYERS)}"
            )
        found["layers_block_type"] = [_NEMOTRON_LAYERS[letter] for letter in pattern]
    if "attention_head_dim" in found:
        found.setdefault("head_dim", found.pop("attention_head_dim"))
    kinds = found.get("layers_block_type")
    if isinstance(kinds, list):
        found["layers_block_type"] = [_OLDER_LAYERS.get(str(kind), kind) for kind in kinds]
    return Given(found, given.where)


def _state_spaces(given: Given) -> Given:
    """Mamba-2 of the package mamba_ssm, as transformers has it."""
    given.only(d_intermediate=0, attn_layer_idx=([], None), rms_norm=True)
    inner = given["ssm_cfg"]
    if not isinstance(inner, dict):
        raise ValueError(f"{given.where}: ssm_cfg must be an object, got {inner!r:.100}")
    inner = Given({"layer": "Mamba1"} | inner, f"{given.where}: ssm_cfg")
    inner.only(layer="Mamba2", D_has_hdim=False, norm_before_gate=False, rmsnorm=True, d_ssm=None)
    features, dim = given["d_model"], inner.get("headdim", 64)
    expand, parts = inner.get("expand", 2), given.get("pad_vocab_size_multiple", 8)
    limits = {"time_step_limit": inner["dt_limit"]} if "dt_limit" in inner.values else {}
    return Given(
        dict(
            model_type="mamba2",
            architectures=["Mamba2ForCausalLM"],
            vocab_size=-(-given["vocab_size"] // parts) * parts,
            hidden_size=features,
            num_hidden_layers=given["n_layer"],
            expand=expand,
            num_heads=expand * features // dim,
            head_dim=dim,
            n_groups=inner.get("ngroups", 1),
            state_size=inner.get("d_state", 128),
            conv_kernel=inner.get("d_conv", 4),
            chunk_size=inner.get("chunk_size", 256),
            use_bias=inner.get("bias", False),
            use_conv_bias=inner.get("conv_bias", True),
            residual_in_fp32=given.get("residual_in_fp32", True),
            tie_word_embeddings=given.get("tie_embeddings", True),
            dtype=given.dtype(),
            **limits,
        ),
        given.where,
    )
