"""What hosts pass when they make an attention layer: taken where it has a meaning here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
from flax import nnx
from flax.core import meta
from flax.nnx.nn.dtypes import promote_dtype

from memcache_jax import _checks

Initializer = Callable[..., Any]


class HostOptions(TypedDict, total=False):
    """Keywords of ``nnx.MultiHeadAttention`` and its like, for ``MemoryCaching`` and ``Attention``.

    What asks for something else than the layer does is a ValueError.

    Attributes:
      kernel_init: initializer of the projections' kernels, by default Flax's. In ``MemoryCaching``
        the kernels of keys and connectors start as copies of the queries'. Names of axes that it
        carries are dropped for the layer's own.
      out_kernel_init: of the last projection; as ``kernel_init`` by default.
      use_bias: whether queries, keys, values and the last projection have a bias; False by default.
      bias_init: initializer of the biases, by default zeros.
      out_bias_init: of the last projection; as ``bias_init`` by default.
      precision: of the projections' products.
      qkv_features: num_heads * head_dim; another way to give head_dim.
      out_features: in_features.
      in_kv_features: in_features.
      num_kv_heads: num_heads.
      num_key_value_heads: num_heads.
      dropout_rate: 0; with it, ``deterministic``, ``broadcast_dropout`` and ``keep_rngs`` have no
        effect.
      broadcast_dropout: without effect.
      deterministic: without effect.
      keep_rngs: without effect.
      decode: False; streams go through ``init_cache``.
      normalize_qk: False. ``MemoryCaching`` divides queries and keys by their norm in any case.
      attention_fn: Flax's default, whose place the layer takes.
      qkv_promote_dtype: Flax's default, and so the next two.
      out_promote_dtype: see qkv_promote_dtype.
      ln_promote_dtype: see qkv_promote_dtype.
      qkv_dot_general: None, and so the next three.
      out_dot_general: see qkv_dot_general.
      qkv_dot_general_cls: see qkv_dot_general.
      out_dot_general_cls: see qkv_dot_general.
      kernel_metadata: empty, and so the rest.
      out_kernel_metadata: see kernel_metadata.
      bias_metadata: see kernel_metadata.
      out_bias_metadata: see kernel_metadata.
      query_ln_scale_metadata: see kernel_metadata.
      key_ln_scale_metadata: see kernel_metadata.
    """

    kernel_init: Initializer
    out_kernel_init: Initializer | None
    use_bias: bool
    bias_init: Initializer
    out_bias_init: Initializer | None
    precision: Any
    qkv_features: int | None
    out_features: int | None
    in_kv_features: int | None
    num_kv_heads: int | None
    num_key_value_heads: int | None
    dropout_rate: float
    broadcast_dropout: bool
    deterministic: bool | None
    keep_rngs: bool
    decode: bool | None
    normalize_qk: bool
    attention_fn: Callable[..., Any]
    qkv_promote_dtype: Any
    out_promote_dtype: Any
    ln_promote_dtype: Any
    qkv_dot_general: Any
    out_dot_general: Any
    qkv_dot_general_cls: Any
    out_dot_general_cls: Any
    kernel_metadata: Any
    out_kernel_metadata: Any
    bias_metadata: Any
    out_bias_metadata: Any
    query_ln_scale_metadata: Any
    key_ln_scale_metadata: Any


class ProjectionOptions(NamedTuple):
    """Options of ``Linear`` for each projection of a layer.

    Attributes:
      gates: of projections that never have a bias.
      inputs: of queries, keys and values.
      out: of the last projection.
    """

    gates: dict[str, Any]
    inputs: dict[str, Any]
    out: dict[str, Any]


def read_host_options(
    layer: str, in_features: int, num_heads: int, head_dim: int | None, **host: Any
) -> tuple[int, ProjectionOptions]:
    """Returns the dimension of a head and the options of the projections.

    Args:
      layer: name of the layer's class, for errors.
      in_features: model dimension.
      num_heads: heads.
      head_dim: dimension of a head as the layer's own argument gives it.
      host: ``HostOptions``.

    Raises:
      TypeError: for an option that no layer has.
      ValueError: for one that this layer does not follow.
    """
    for name in host:
        if name not in HostOptions.__annotations__:
            raise TypeError(f"{layer}.__init__() got an unexpected keyword argument {name!r}")
    for name, allowed, reason in _fixed(in_features, num_heads):
        if name in host and not any(_is(host[name], value) for value in allowed):
            raise ValueError(f"{layer} takes no {name}={_checks.shown(host[name])}: {reason}")
    for name in (name for name in host if name.endswith("_metadata")):
        metadata = host[name]
        if metadata is not None and not (isinstance(metadata, Mapping) and not metadata):
            raise ValueError(
                f"{layer} takes no {name}={_checks.shown(metadata)}: its parameters "
                "carry the names of their axes already"
            )
    for name in ("kernel_init", "out_kernel_init", "bias_init", "out_bias_init"):
        init = host.get(name)
        if init is not None and (not callable(init) or isinstance(init, type)):
            raise ValueError(
                f"{name} must be an initializer, a function (key, shape, dtype), got "
                f"{_checks.shown(init)}"
            )
    _checks.check_flag("use_bias", host.get("use_bias", False))
    head_dim = _checks.check_integer("head_dim", head_dim, optional=True)
    inner = _checks.check_integer("qkv_features", host.get("qkv_features"), optional=True)
    if inner is not None:
        if inner % num_heads or head_dim not in (None, inner // num_heads):
            wanted = "a multiple of it" if head_dim is None else num_heads * head_dim
            raise ValueError(
                f"qkv_features must be num_heads * head_dim, with num_heads={num_heads} {wanted}, "
                f"got {inner}"
            )
        head_dim = inner // num_heads
    return _checks.check_heads(in_features, num_heads, head_dim), _projections(**host)


def _projections(
    *,
    kernel_init: Initializer | None = None,
    out_kernel_init: Initializer | None = None,
    use_bias: bool = False,
    bias_init: Initializer | None = None,
    out_bias_init: Initializer | None = None,
    precision: Any = None,
    **others: Any,
) -> ProjectionOptions:
    del others

    def kernel(init: Initializer | None) -> dict[str, Any]:
        made: dict[str, Any] = dict(precision=precision)
        return made if init is None else made | dict(kernel_init=_without_names(init))

    def bias(init: Initializer | None) -> dict[str, Any]:
        init = jax.nn.initializers.zeros if init is None else init
        return dict(use_bias=True, bias_init=_without_names(init)) if use_bias else {}

    return ProjectionOptions(
        gates=kernel(kernel_init),
        inputs=kernel(kernel_init) | bias(bias_init),
        out=kernel(out_kernel_init or kernel_init) | bias(out_bias_init or bias_init),
    )


def _fixed(in_features: int, num_heads: int) -> list[tuple[str, tuple, str]]:
    """Options of which only some values are what a layer does: (name, values, reason)."""
    heads = f"keys and values have num_heads={num_heads} heads, as queries have"
    features = f"inputs and outputs have in_features={in_features}"
    fixed: list[tuple[str, tuple, str]] = [
        ("num_kv_heads", (None, num_heads), heads),
        ("num_key_value_heads", (None, num_heads), heads),
        ("out_features", (None, in_features), features),
        ("in_kv_features", (None, in_features), features),
        ("dropout_rate", (None, 0), "it has no dropout"),
        ("decode", (None, False), "streams go through init_cache and cache="),
        ("normalize_qk", (None, False), "it has no LayerNorm of queries and keys"),
        (
            "attention_fn",
            (None, nnx.dot_product_attention),
            "it takes the place of the attention function",
        ),
    ]
    for name in ("qkv_promote_dtype", "out_promote_dtype", "ln_promote_dtype"):
        fixed.append((name, (None, promote_dtype), "dtype and param_dtype tell its dtypes"))
    for name in ("qkv_dot_general", "out_dot_general"):
        for option in (name, f"{name}_cls"):
            fixed.append((option, (None,), "its products are jax.lax.dot_general"))
    return fixed


def _is(got: Any, value: Any) -> bool:
    """Whether a host's value is one that a layer follows, whatever it compares like."""
    return got is value or (isinstance(got, (bool, int, float, np.generic)) and got == value)


def _without_names(init: Initializer) -> Initializer:
    """An initializer without the names of ``nnx.with_partitioning``, or of Linen's like it."""

    def plain(*args: Any, **kwargs: Any) -> Any:
        made = init(*args, **kwargs)
        return made.raw_value if isinstance(made, nnx.VariableMetadata) else meta.unbox(made)

    return plain
