"""The gated delta rule's mixer, as several families have it."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.memories import GatedDeltaNet
from memcache_jax.nn.recurrent import Output, Path, Rate, RecurrentMixer, TimeStepDecay
from memcache_jax.pretrained.tensors import Names, Tensor


def mixer(
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    width: int | None,
    *,
    epsilon: float,
    rate: float = 1.0,
    gate: Any = "silu",
    conv_bias: bool = False,
) -> RecurrentMixer:
    """L2 norm of queries and keys after a convolution and SiLU, output norm per head, a gate."""
    conv: dict[str, Any] = dict(conv_width=width, conv_bias=conv_bias)
    if not width:
        conv["activation"] = "silu"
    keys = Path(key_heads, key_dim, norm="l2", **conv)
    return RecurrentMixer(
        GatedDeltaNet(),
        query=Path(key_heads, key_dim, norm="l2", scale=key_dim**-0.5, **conv),
        key=keys,
        value=Path(value_heads, value_dim, **conv),
        coefficients=(TimeStepDecay(), Rate(scale=rate)),
        output=Output(epsilon=epsilon, gate=gate),
    )


QUERY, KEY, VALUE = (f"mixer/{name}/linear" for name in ("query", "key", "value"))
CONVS = tuple(f"mixer/{name}/conv" for name in ("query", "key", "value"))
DECAY, RATE = "mixer/coefficients/0/linear", "mixer/coefficients/1/linear"
GATE, OUT, SCALE = "mixer/output/gate", "mixer/output/out", "mixer/output/scale"


def constants(names: Names, where: str) -> Iterator[Tensor]:
    """The decays' constants."""
    yield names.same(f"{where}.A_log", "mixer/coefficients/0/A_log")
    yield names.same(f"{where}.dt_bias", "mixer/coefficients/0/dt_bias")


def separate(names: Names, where: str, gate: bool = True) -> Iterator[Tensor]:
    """One matrix per projection, named by its first letter."""
    of = dict(q=QUERY, k=KEY, v=VALUE, a=DECAY, b=RATE, o=OUT) | (dict(g=GATE) if gate else {})
    for letter, path in of.items():
        yield from names.linear(f"{where}.{letter}_proj", path)
    yield names.same(f"{where}.o_norm.weight", SCALE)
    yield from constants(names, where)
