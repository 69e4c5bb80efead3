"""The model around the mixers of flash-linear-attention."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import (
    BlockConfig,
    GatedMLP,
    GroupedAttentionMixer,
    LanguageModelConfig,
    Mixer,
    Norm,
)
from memcache_jax.pretrained.families import _model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor

_ATTENTION = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}


def model(given: Given, mixer: Mixer, heads: int, **options: Any) -> LanguageModelConfig:
    """Blocks of one mixer and a gated MLP; those that ``attn`` names mix by attention instead."""
    given.only(attnres_block_size=None, hidden_act=("swish", "silu"), elementwise_affine=True)
    hidden = given.get("intermediate_size")
    if hidden is None:
        hidden = int(given["hidden_size"] * given.get("hidden_ratio", 4) * 2 / 3)
        hidden = -(-hidden // 256) * 256
    norm = Norm(epsilon=given.number("norm_eps", 1e-6))
    mixers = [of_layer or mixer for of_layer in attention(given)]
    blocks = [BlockConfig(mixer, GatedMLP(hidden), norm) for mixer in mixers]
    return _model.model(given, blocks, norm, heads, **options)


def attention(given: Given) -> list[GroupedAttentionMixer | None]:
    """The attention of each layer; None where there is the model's own mixer."""
    given_attention, features = given.get("attn", []), given["hidden_size"]
    specs = given_attention if isinstance(given_attention, list) else [given_attention]
    found: list[GroupedAttentionMixer | None] = [None] * given["num_hidden_layers"]
    for values in specs:
        spec = Given(values, f"{given.where}: attn")
        if unknown := sorted(set(values) - _ATTENTION):
            raise ValueError(f"{spec.where} has {', '.join(unknown)}, which is not supported")
        heads = spec["num_heads"]
        if features % heads:
            raise ValueError(f"{spec.where}: num_heads={heads} must divide hidden_size={features}")
        mixer = GroupedAttentionMixer(
            heads,
            spec.get("num_kv_heads", heads),
            features // heads,
            rope_base=spec.number("rope_theta", 10_000.0),
            window=spec.get("window_size"),
            use_bias=spec.get("qkv_bias", False),
        )
        for layer in spec["layers"]:
            if not 0 <= layer < len(found) or found[layer] is not None:
                raise ValueError(
                    f"{spec.where}: layers must be different ones of {len(found)}, got {layer}"
                )
            found[layer] = mixer
    return found


def own_layers(given: Given) -> Iterator[Names]:
    """As ``layers``, without those that mix by attention."""
    pairs = zip(layers(given), attention(given), strict=True)
    yield from (names for names, of_layer in pairs if of_layer is None)


def layers(given: Given) -> Iterator[Names]:
    """The names of each layer's tensors."""
    for layer in range(given["num_hidden_layers"]):
        yield Names(f"model.layers.{layer}.", layer)


def tensors(given: Given) -> Iterator[Tensor]:
    """All tensors but those of the mixers of ``own_layers``."""
    yield from _model.ends(given, "model.embeddings", "model.norm")
    for names in layers(given):
        yield names.same("attn_norm.weight", "mixer_norm/scale")
        yield names.same("mlp_norm.weight", "mlp_norm/scale")
        yield from _model.gated_mlp(names)
    yield from attention_tensors(given)


def attention_tensors(given: Given) -> Iterator[Tensor]:
    """Those of the layers that mix by attention."""
    for names, mixer in zip(layers(given), attention(given), strict=True):
        if mixer is not None:
            for letter, part in dict(q="query", k="key", v="value", o="out").items():
                bias = mixer.use_bias and letter != "o"
                yield from names.linear(f"attn.{letter}_proj", f"mixer/{part}", bias=bias)


def projections(names: Names, gate: bool, **others: str) -> Iterator[Tensor]:
    """Those of queries, keys, values, the output, perhaps a gate, and others by their letter."""
    paths = dict(q="query/linear", k="key/linear", v="value/linear", o="output/out") | others
    if gate:
        paths["g"] = "output/gate"
    for letter, path in paths.items():
        yield from names.linear(f"attn.{letter}_proj", f"mixer/{path}")


def convolutions(given: Given, names: Names) -> Iterator[Tensor]:
    """Those of queries, keys and values, where there are any."""
    if given.get("use_short_conv", True):
        bias = bool(given.get("conv_bias", False))
        for letter, part in dict(q="query", k="key", v="value").items():
            yield from names.conv(f"attn.{letter}_conv1d", f"mixer/{part}/conv", bias=bias)


def conv_options(given: Given, default: bool = True) -> dict[str, Any]:
    """The options of paths that say what convolution there is."""
    if not given.get("use_short_conv", default):
        return {}
    bias = bool(given.get("conv_bias", False))
    return dict(conv_width=given.get("conv_size", 4), conv_bias=bias)
