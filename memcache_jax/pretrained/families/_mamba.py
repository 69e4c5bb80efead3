"""Mamba-2's mixer, as several families have it."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.memories import SSD
from memcache_jax.nn.recurrent import Output, Path, RecurrentMixer, TimeStep
from memcache_jax.pretrained.tensors import Names, Tensor


def mixer(
    heads: int,
    dim: int,
    groups: int,
    state: int,
    width: int,
    *,
    limits: tuple[float, ...],
    epsilon: float,
    conv_bias: bool = True,
) -> RecurrentMixer:
    """Read C, key B, value x, all convolved; the gate before a norm over groups; D x added."""
    conv: dict[str, Any] = dict(conv_width=width, conv_bias=conv_bias)
    return RecurrentMixer(
        SSD(),
        query=Path(groups, state, **conv),
        key=Path(groups, state, **conv),
        value=Path(heads, dim, **conv),
        coefficients=(TimeStep(*limits),),
        output=Output(groups, epsilon, shared_scale=False, gate="silu", gate_first=True),
        skip=True,
    )


def tensors(names: Names, where: str, conv_bias: bool = True) -> Iterator[Tensor]:
    """One projection of z, x, B, C and dt, and one convolution of x, B and C."""
    value, key, query = (f"mixer/{name}" for name in ("value", "key", "query"))
    convolved = value, key, query
    step = "mixer/coefficients/0"
    inner = (f"{path}/linear" for path in convolved)
    yield from names.linear(f"{where}.in_proj", "mixer/output/gate", *inner, f"{step}/linear")
    yield from names.conv(
        f"{where}.conv1d", *(f"{path}/conv" for path in convolved), bias=conv_bias
    )
    yield names.same(f"{where}.A_log", f"{step}/A_log")
    yield names.same(f"{where}.dt_bias", f"{step}/dt_bias")
    yield names.same(f"{where}.D", "mixer/skip")
    yield names.same(f"{where}.norm.weight", "mixer/output/scale")
    yield from names.linear(f"{where}.out_proj", "mixer/output/out")
