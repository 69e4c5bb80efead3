"""What families have in common: the model around the blocks, MLPs and attention."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.nn import (
    BlockConfig,
    GroupedAttentionMixer,
    LanguageModelConfig,
    Norm,
)
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Part, Tensor


def model(
    given: Given, blocks: list[BlockConfig], norm: Norm, heads: int, **options: Any
) -> LanguageModelConfig:
    """A model of these blocks."""
    return LanguageModelConfig(
        vocab_size=given["vocab_size"],
        num_layers=len(blocks),
        features=given["hidden_size"],
        num_heads=heads,
        blocks=tuple(blocks),
        norm=norm,
        tie_embeddings=bool(given.get("tie_word_embeddings", False)),
        **options,
    )


def ends(given: Given, embedding: str, norm: str, bias: bool = False) -> Iterator[Tensor]:
    """The embedding, the last norm and the output layer."""
    names = Names("")
    yield names.same(f"{embedding}.weight", "embedding/embedding")
    yield from names.norm(norm, "norm", bias)
    if not given.get("tie_word_embeddings", False):
        yield from names.linear("lm_head", "head")


def gated_mlp(
    names: Names, where: str = "mlp", path: str = "mlp", bias: bool = False
) -> Iterator[Tensor]:
    """A gated MLP of three projections."""
    for part in ("gate", "up", "down"):
        yield from names.linear(f"{where}.{part}_proj", f"{path}/{part}", bias=bias)


def joined_experts(names: Names, where: str, count: int, path: str = "mlp") -> Iterator[Tensor]:
    """Sparse experts, of which other files have two tensors: gates and ups of all, and downs."""
    yield from names.linear(f"{where}.gate", f"{path}/router")
    for expert in range(count):
        own, both = f"{names.prefix}{where}.experts", ("gate", "up")
        yield Tensor(
            tuple(f"{own}.{expert}.{part}_proj.weight" for part in both),
            tuple(Part(f"{path}/{part}", "matrix", expert) for part in both),
            names.layer,
            others=(f"{own}.gate_up_proj",),
            others_row=expert,
        )
        yield Tensor(
            (f"{own}.{expert}.down_proj.weight",),
            (Part(f"{path}/down", "matrix", expert),),
            names.layer,
            others=(f"{own}.down_proj",),
            others_row=expert,
        )


def experts(
    names: Names,
    where: str,
    count: int,
    called: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    path: str = "mlp",
) -> Iterator[Tensor]:
    """Sparse experts, each of three projections, which the file calls so."""
    yield from names.linear(f"{where}.gate", f"{path}/router")
    for expert in range(count):
        for part, name in zip(("gate", "up", "down"), called, strict=True):
            own = Part(f"{path}/{part}", "matrix", expert)
            yield names.tensor(f"{where}.experts.{expert}.{name}.weight", own)


def attention(given: Given, **options: Any) -> GroupedAttentionMixer:
    """Attention of a configuration's heads."""
    heads = given["num_attention_heads"]
    dim = given.get("head_dim", given["hidden_size"] // heads)
    bias = bool(given.get("attention_bias", False))
    return GroupedAttentionMixer(
        heads,
        given.get("num_key_value_heads", heads),
        dim,
        use_bias=bias,
        use_out_bias=bias,
        **options,
    )


def attention_tensors(
    names: Names, where: str, given: Given, path: str = "mixer"
) -> Iterator[Tensor]:
    """Its four projections."""
    bias = bool(given.get("attention_bias", False))
    for name, part in dict(q="query", k="key", v="value", o="out").items():
        yield from names.linear(f"{where}.{name}_proj", f"{path}/{part}", bias=bias)


def layer_types(given: Given) -> list[str]:
    """What each layer mixes tokens by; older files say how often one is attention."""
    kinds = given.get("layer_types")
    if kinds is None:
        count, every = given["num_hidden_layers"], given.get("full_attention_interval", 4)
        names = "linear_attention", "full_attention"
        kinds = [names[(layer + 1) % every == 0] for layer in range(count)]
    return list(kinds)
