"""The families of published models that are served, each in a file of names and shapes."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from memcache_jax.nn import LanguageModelConfig
from memcache_jax.pretrained.families import (
    bamba,
    delta_net,
    falcon_h1,
    gated_deltanet,
    gla,
    granitemoehybrid,
    kimi_linear,
    mamba2,
    nemotron_h,
    olmo_hybrid,
    qwen3_5_moe_text,
    qwen3_5_text,
    qwen3_next,
    retnet,
    rwkv7,
)
from memcache_jax.pretrained.forms import TEXT_OF
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Tensor


@runtime_checkable
class Family(Protocol):
    """A file of this folder."""

    def config(self, given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
        """The model's shape, from its ``config.json``; ValueError for what is not supported."""
        ...

    def tensors(self, given: Given) -> Iterator[Tensor]:
        """How the files' tensors are made of the model's parameters."""
        ...


FAMILIES: dict[str, Any] = {
    "bamba": bamba,
    "delta_net": delta_net,
    "falcon_h1": falcon_h1,
    "gated_deltanet": gated_deltanet,
    "gla": gla,
    "granitemoehybrid": granitemoehybrid,
    "kimi_linear": kimi_linear,
    "mamba2": mamba2,
    "nemotron_h": nemotron_h,
    "olmo_hybrid": olmo_hybrid,
    "qwen3_5_moe_text": qwen3_5_moe_text,
    "qwen3_5_text": qwen3_5_text,
    "qwen3_next": qwen3_next,
    "retnet": retnet,
    "rwkv7": rwkv7,
}
"""By the ``model_type`` of a text model's ``config.json``."""


def family_of(given: Given) -> Family:
    """Returns the family of a model.

    Raises:
      ValueError: if it is not supported.
    """
    kind = given["model_type"]
    if not isinstance(kind, str) or kind not in FAMILIES:
        served = ", ".join(sorted([*FAMILIES, *TEXT_OF]))
        raise ValueError(f"{given.where}: model_type={kind!r} is not supported, only {served}")
    return FAMILIES[kind]
