"""Mamba-2's mixer, as several families have it."""

from collections.abc import Iterator
from typing import Any

from memcache_jax.memories import SSD
from memcache_jax.nn.recurrent import Output, Path, RecurrentMixer, TimeStep
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.tensors import Names, Tensor


def with_defaults(given: Given) -> Given:
    """With the heads of keys that Bamba and Falcon-H1 have where a file does not say."""
    return Given({"num_key_value_heads": 8} | dict(given.values), given.where)


def sizes(given: Given, inner: int) -> tuple[int, int]:
    """Heads and their dimension, which a configuration may leave to ``inner`` channels."""
    heads, dim = given.get("mamba_n_heads", 128), given.get("mamba_d_head", "auto")
    return heads, inner // heads if dim == "auto" else dim


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
    bias: bool = False,
    scales: tuple[float, ...] = (1.0,) * 5,
    **output: Any,
) -> RecurrentMixer:
    """Read C, key B, value x, all convolved; the gate before a norm over groups; D x added.

    ``bias`` is that of both projections, ``scales`` are factors of z, x, B, C and dt as they are
    projected, and ``output`` are options of the ``Output`` that are unlike those of Mamba-2.
    """
    of_gate, of_value, of_key, of_query, of_step = scales
    conv: dict[str, Any] = dict(conv_width=width, conv_bias=conv_bias, use_bias=bias)
    options: dict[str, Any] = dict(norm_groups=groups, shared_scale=False, gate_first=True)
    options |= dict(use_bias=bias, gate_bias=bias) | output
    return RecurrentMixer(
        SSD(),
        query=Path(groups, state, projection_scale=of_query, **conv),
        key=Path(groups, state, projection_scale=of_key, **conv),
        value=Path(heads, dim, projection_scale=of_value, **conv),
        coefficients=(TimeStep(*limits, scale=of_step, use_bias=bias),),
        output=Output(epsilon=epsilon, gate_scale=of_gate, **options),
        skip=True,
    )


def tensors(
    names: Names,
    where: str,
    conv_bias: bool = True,
    *,
    path: str = "mixer",
    norm: bool = True,
    bias: bool = False,
    out_bias: bool | None = None,
) -> Iterator[Tensor]:
    """One projection of z, x, B, C and dt, and one convolution of x, B and C."""
    convolved = [f"{path}/{name}" for name in ("value", "key", "query")]
    step, inner = f"{path}/coefficients/0", (f"{part}/linear" for part in convolved)
    projected = f"{path}/output/gate", *inner, f"{step}/linear"
    yield from names.linear(f"{where}.in_proj", *projected, bias=bias)
    convs = (f"{part}/conv" for part in convolved)
    yield from names.conv(f"{where}.conv1d", *convs, bias=conv_bias)
    yield names.same(f"{where}.A_log", f"{step}/A_log")
    yield names.same(f"{where}.dt_bias", f"{step}/dt_bias")
    yield names.same(f"{where}.D", f"{path}/skip")
    if norm:
        yield names.same(f"{where}.norm.weight", f"{path}/output/scale")
    of_out = bias if out_bias is None else out_bias
    yield from names.linear(f"{where}.out_proj", f"{path}/output/out", bias=of_out)
