"""The parameters of a memory-caching layer: projections, the rule's coefficients, the output."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Float, Int
from memcache_jax.aggregation import Aggregation
from memcache_jax.memories import Control, Memory
from memcache_jax.nn.host_options import ProjectionOptions
from memcache_jax.nn.layers import SMALL, CausalConv, Linear, as_laid, copy_of, l2_normalize
from memcache_jax.nn.memory_layer import MemoryLayer
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.names import partitioned


class Projections(MemoryLayer):
    """Maps a layer's input to the memory's arguments, and what the memory returns to the output.

    The arguments are those of ``MemoryCaching``.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        memory: Memory,
        aggregation: Aggregation,
        head_dim: int,
        connector: Literal["learned", "query", "previous"],
        distances: int,
        conv_width: int,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        options_of: ProjectionOptions,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.num_heads = in_features, num_heads
        self.head_dim = self.value_dim = head_dim
        self.memory, self.aggregation = memory, aggregation
        self.dtype, self.param_dtype = dtype, param_dtype
        inner = num_heads * head_dim
        options: dict[str, Any] = dict(param_dtype=param_dtype, rngs=rngs)

        def linear(size_out: int, **kwargs: Any) -> Linear:
            kwargs = options_of.gates | kwargs
            axes = ("embed", "heads")
            return Linear(in_features, size_out, axes=axes, dtype=dtype, **options, **kwargs)

        def conv(kernel_init=jax.nn.initializers.normal(conv_width**-0.5)) -> CausalConv:
            return CausalConv(inner, conv_width, kernel_init=kernel_init, **options)

        self.query, self.value = (linear(inner, **options_of.inputs) for _ in range(2))
        self.query_conv, self.value_conv = conv(), conv()
        # Keys and connectors start as copies of the queries, and so match them from the first step
        # on; with unrelated maps recall stays on a plateau.
        copies = dict(kernel_init=copy_of(self.query.kernel))
        if self.query.bias is not None:
            copies["bias_init"] = copy_of(self.query.bias)
        self.key = linear(inner, **options_of.inputs | copies)
        self.key_conv = conv(copy_of(self.query_conv.kernel))
        wanted = None if connector == "previous" else aggregation.relevance.connector
        if wanted == "distances":
            self.connector = linear(num_heads * distances)
        elif wanted == "key":
            if connector == "learned":
                self.connector = linear(inner, kernel_init=copy_of(self.query.kernel))
            init = partitioned(jax.nn.initializers.constant(10.0), "heads")
            self.temperature = nnx.Param(init(jax.random.key(0), (num_heads,), param_dtype))

        self.controls = nnx.Dict()
        for name, control in memory.controls.items():
            if control.is_learned and control.per_head is None:
                size = num_heads * (self.head_dim if control.per_channel else 1)
                bias_init = jax.nn.initializers.constant(control.bias)
                self.controls[name] = linear(
                    size, use_bias=True, kernel_init=SMALL, bias_init=bias_init
                )
        self.weights = nnx.Dict()
        for name, shape in memory.weight_shapes(self.head_dim, self.head_dim).items():
            # Not zero: in a network of zeros, no layer ever gets a gradient.
            normal = jax.nn.initializers.normal(shape[1] ** -0.5)
            longest = shape.index(max(shape))
            axes = ("embed" if axis == longest else None for axis in range(len(shape)))
            init = partitioned(normal, "heads", *axes)
            self.weights[name] = nnx.Param(init(rngs.params(), (num_heads, *shape), param_dtype))

        self.norm = nnx.RMSNorm(self.head_dim, dtype=dtype, **options)
        self.output_gate = linear(inner)
        axes = ("heads", "embed")
        self.out = Linear(inner, in_features, axes=axes, dtype=dtype, **options, **options_of.out)

    def _tokens(
        self, x: Float[Array, "b t d"], document_ids: Int[Array, "b t"] | None, first: Any
    ) -> tuple[dict[str, Any], Any]:
        rows = [linear(x) for linear, _ in self._paths]
        tokens: Any = *((row, "b t h") for row in rows), (document_ids, "b t")
        division = Division.of(*tokens, heads=self.num_heads)
        query, key, value = (
            conv(row, document_ids, division)
            for (_, conv), row in zip(self._paths, rows, strict=True)
        )
        return self._arguments(x, query, key, value, division), None

    def _next_tokens(
        self,
        x: Float[Array, "b t d"],
        tails: tuple,
        counts: Int[Array, "b"],
        position: Int[Array, "b"],
        first: Any,
    ) -> tuple[dict[str, Any], Any, tuple]:
        rows = [linear(x) for linear, _ in self._paths]
        tokens: Any = *((row, "b . h") for row in rows), (tails[0], "b . h")
        division = Division.of(*tokens, heads=self.num_heads)
        paths = zip(self._paths, rows, tails, strict=True)
        new = [conv.extend(row, tail, counts, division) for (_, conv), row, tail in paths]
        (query, key, value), tails = zip(*new, strict=True)
        return self._arguments(x, query, key, value, division), None, tails

    def _empty_tails(self, batch_size: int, dtype: DTypeLike) -> tuple:
        return tuple(conv.init_tail(batch_size, dtype) for _, conv in self._paths)

    @property
    def _paths(self) -> tuple[tuple[Any, CausalConv], ...]:
        """The projection and the convolution of queries, keys and values."""
        return (
            (self.query, self.query_conv),
            (self.key, self.key_conv),
            (self.value, self.value_conv),
        )

    def _initial_weights(self) -> dict[str, Array]:
        # By name: hosts attach variables of their own to every module.
        names = self.memory.weight_shapes(self.head_dim, self.head_dim)
        return {name: self.weights[name][...] for name in names}

    def _arguments(
        self, x: Array, query: Array, key: Array, value: Array, division: Division | None
    ) -> dict[str, Any]:
        """The per-token arguments of ``mc.memory_caching``, from convolved projections."""

        def heads(x: Float[Array, "b t hk"]) -> Float[Array, "b t h k"]:
            return self._split(x if division is None else division.lay(x, "b t h"))

        query, key = l2_normalize(heads(query)), l2_normalize(heads(key))
        connector = None
        wanted = None if self.follows else self.aggregation.relevance.connector
        if wanted == "distances":
            connector = heads(self.connector(x))
        elif wanted == "key":
            learned = hasattr(self, "connector")
            connector = l2_normalize(heads(self.connector(x))) if learned else query
            temperature = self.temperature[...].astype(x.dtype)
            if division is not None:
                temperature = division.lay(temperature, "h")
            connector *= temperature[None, None, :, None]
        controls = {
            name: self._control(control, name, x, heads)
            for name, control in self.memory.controls.items()
            if control.is_learned
        }
        return dict(
            query=query,
            key=key,
            value=heads(value),
            connector=connector,
            controls=self.memory.coupled(controls),
        )

    def _empty_output(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.out(self.value(x))

    def _output(
        self, x: Float[Array, "b t d"], y: Float[Array, "b t h k"], kept: Any
    ) -> Float[Array, "b t d"]:
        y = self.norm(y).reshape(*x.shape[:2], -1)
        return self.out(y * jax.nn.silu(self.output_gate(x)), as_laid(x))

    def _split(self, x: Float[Array, "b t hk"]) -> Float[Array, "b t h k"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def _control(
        self, control: Control, name: str, x: Float[Array, "b t d"], heads: Callable[[Array], Array]
    ) -> Array:
        """One of the rule's coefficients, in float32: in bfloat16 a decay near 1 rounds to 1."""
        if control.per_head is not None:
            return control.per_head(self.num_heads)
        logits = self.controls[name](x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if control.per_channel:
            logits = heads(logits)
        return control.scale * control.activation(logits)
