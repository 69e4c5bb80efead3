"""RWKV-7 of flash-linear-attention (arXiv:2503.14456)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from memcache_jax.memories import RWKV7
from memcache_jax.nn import BlockConfig, ChannelMix, LanguageModelConfig, Norm
from memcache_jax.nn.recurrent import (
    InContextRate,
    LimitedDecay,
    LowRank,
    Output,
    Path,
    RecurrentMixer,
)
from memcache_jax.pretrained.families import _fla, _model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def config(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The model's shape."""
    given.only(hidden_act="sqrelu", norm_bias=True)
    features = given["hidden_size"]
    norm = Norm("layer", given.number("norm_eps", 1e-5))
    attention = _fla.attention(given)
    if attention[0] is not None:
        raise ValueError(
            f"{given.where}: attn: layer 0 must not be attention: later layers mix in its values"
        )
    first, *others = (_mixer(given, value, layer) for layer, value in enumerate(_values(given)))
    if others:
        first = dataclasses.replace(first, shares_values=True)
    mixers = [of_layer or own for of_layer, own in zip(attention, (first, *others), strict=True)]
    hidden = given.get("intermediate_size")
    if hidden is None:
        hidden = -(-int(features * given.get("hidden_ratio", 4)) // 32) * 32
    blocks = [BlockConfig(mixer, ChannelMix(hidden), norm) for mixer in mixers]
    options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
    if given.get("norm_first", True):
        options["embedding_norm"] = norm
    return _model.model(given, blocks, norm, first.value.heads, **options)


def _values(given: Given) -> list[int]:
    """Channels of the values of each layer."""
    values = given.get("value_dim", given["hidden_size"])
    count = given["num_hidden_layers"]
    values = list(values) if isinstance(values, list | tuple) else [values] * count
    if len(values) != count or len(set(values)) > 1:
        raise ValueError(
            f"{given.where}: value_dim={values} must be one size for all {count} layers, which mix "
            "in the values of the first"
        )
    return values


def _mixer(given: Given, value_dim: int, layer: int) -> RecurrentMixer:
    features, dim = given["hidden_size"], given.get("head_dim", 64)
    heads = given["num_heads"] if dim is None else features // dim
    dim = features // heads

    def low(name: str, default: int, factor: float, **options: Any) -> LowRank:
        name = f"{name}_low_rank_dim"
        if given.get(name) is None and name in given.values:  # null asks for a size that fits
            default = max(32, round(factor * features**0.5 / 32) * 32)
        return LowRank(given.get(name, default), **options)

    epsilon = 1e-6 if given.get("fuse_norm", True) else None
    keys = Path(heads, dim, shift=True)
    first = low("v", 16, 1.7 * dim / 64) if layer else None
    return RecurrentMixer(
        RWKV7(),
        query=keys,
        key=keys,
        value=Path(heads, value_dim // heads, shift=True, first=first),
        coefficients=(
            LimitedDecay(low("decay", 64, 2.5 * dim / 64, activation="tanh", shift=True)),
            InContextRate(low("a", 64, 2.5 * dim / 64, shift=True), epsilon),
        ),
        output=Output(
            norm="group",
            epsilon=dim * given.number("norm_eps", 1e-5),
            shared_scale=False,
            gate="linear",
            gate_low=low("gate", 128, 5.0, activation="sigmoid", use_bias=False, shift=True),
        ),
        bonus=True,
    )


def tensors(given: Given) -> Iterator[Tensor]:
    """The tensors of its files."""
    yield from _model.ends(given, "model.embeddings", "model.norm", bias=True)
    mixer, decay, rate = "mixer", "mixer/coefficients/0", "mixer/coefficients/1"
    for names in _fla.layers(given):
        if names.layer == 0 and given.get("norm_first", True):
            yield from Names(names.prefix).norm("pre_norm", "embedding_norm", bias=True)
        yield from names.norm("attn_norm", "mixer_norm", bias=True)
        yield from names.norm("ffn_norm", "mlp_norm", bias=True)
        yield names.same("ffn.x_k", "mlp/mix")
        yield from names.linear("ffn.key", "mlp/up")
        yield from names.linear("ffn.value", "mlp/down")
    yield from _fla.attention_tensors(given)
    for names in _fla.own_layers(given):
        paths = dict(r="query", k="key", v="value")
        for letter, path in paths.items():
            yield from names.linear(f"attn.{letter}_proj", f"mixer/{path}/linear")
        yield from names.linear("attn.o_proj", "mixer/output/out")
        low = dict(w=f"{decay}/low", a=f"{rate}/low", g="mixer/output/gate")
        if names.layer:
            low["v"] = "mixer/value/first"
        for letter, path in low.items():
            yield from names.linear(f"attn.{letter}_lora.lora.0", f"{path}/down")
            bias = letter != "g"
            yield from names.linear(f"attn.{letter}_lora.lora.2", f"{path}/up", bias=bias)
        shifted = {letter: f"{mixer}/{path}" for letter, path in paths.items()}
        shifted |= {letter: low[letter] for letter in "wag"}
        # The first version of such files has the six in one.
        of_first: dict[str, Any] = dict(others=(f"{names.prefix}attn.x_x",), shape=(1, 1, -1))
        for letter, path in shifted.items():
            row = "rwkvag".index(letter)
            yield names.same(f"attn.x_{letter}", f"{path}/mix", others_row=row, **of_first)
        yield names.same("attn.k_k", f"{rate}/removal")
        yield names.same("attn.k_a", f"{rate}/replacement")
        yield names.same("attn.r_k", "mixer/bonus")
        yield names.same("attn.g_norm.weight", "mixer/output/scale")
        yield names.same("attn.g_norm.bias", "mixer/output/bias")
