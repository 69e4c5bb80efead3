"""Small layers used by several modules."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from memcache_jax._typing import Array, Float, Int
from memcache_jax._varying import alike
from memcache_jax.kernels.short_conv import conv_silu, document_conv_silu
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import as_spec, axes_of, context_mesh, explicit_axes
from memcache_jax.sharding.names import partitioned
from memcache_jax.sharding.time import over_time

# Coefficients start near their bias for every token: with large steps, a run of equal tokens makes
# a deep memory diverge.
SMALL = jax.nn.initializers.variance_scaling(0.01, "fan_in", "normal")
_LECUN_NORMAL = jax.nn.initializers.lecun_normal()  # Flax's default


class Linear(nnx.Linear):
    """``nnx.Linear`` over all tokens as one matrix, without a bias by default.

    With separate batch and time axes XLA's CPU backend transposes every cotangent, which makes
    forward and backward 1.7 times slower. On a mesh they stay separate, since it may split both.

    ``axes`` are the logical names of the kernel's two axes, as in ``sharding.names.RULES``, or None
    for an axis that is never divided.
    The other arguments are those of ``nnx.Linear``.
    """

    low_rank: Any = None
    """The adapter of ``mc.nn.with_lora``, if it has one."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        use_bias: bool = False,
        kernel_init: jax.nn.initializers.Initializer = _LECUN_NORMAL,
        bias_init: jax.nn.initializers.Initializer = jax.nn.initializers.zeros,
        **options: Any,
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=partitioned(kernel_init, *axes),
            bias_init=partitioned(bias_init, axes[1]),
            **options,
        )
        self.axes = axes

    def __call__(self, inputs: Float[Array, "... d"], out_sharding: Any = None) -> Array:
        """Returns inputs W + b, and what an adapter adds.

        With Explicit axes the output is divided as the inputs are and, along its last axis, as the
        kernel is, unless ``out_sharding`` says otherwise.
        """
        product = self._product(inputs, out_sharding)
        return product if self.low_rank is None else product + self.low_rank(inputs, out_sharding)

    def _product(self, inputs: Float[Array, "... d"], out_sharding: Any) -> Array:
        mesh = context_mesh(inputs)
        if mesh is None and inputs.size:
            rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]), out_sharding)
            return rows.reshape(*inputs.shape[:-1], -1)
        if mesh is not None and out_sharding is None:
            out_sharding = product_sharding(inputs, self.kernel[...], 1)
        return super().__call__(inputs, out_sharding)


class Embed(nnx.Embed):
    """``nnx.Embed`` whose ``attend`` gives logits in float32 or wider."""

    def attend(self, query: Float[Array, "... d"], out_sharding: Any = None) -> Array:
        """Returns the products of the query and each embedding.

        With Explicit axes they are divided as the query is and, along the last axis, as the table
        is, unless ``out_sharding`` says otherwise.
        """
        rows, table = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        if out_sharding is None:
            out_sharding = product_sharding(query, self.embedding[...], 0)
        return jnp.dot(rows, table.T, preferred_element_type=wide, out_sharding=out_sharding)


NAN_OUTSIDE: dict[str, Any] = dict(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
"""Options of ``x.at[ids].get``: an id outside the table gives a row of NaN."""


def rows_of(table: Float[Array, "vocab d"], tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns the tokens' rows of a table, whose gradient is allocated only when it is computed.

    XLA schedules the gradient's zeros, as large as the table, as early as it can: before the
    backward pass of all layers. In a branch of ``lax.cond`` they must wait for the rows' gradient.
    On a mesh the branch would contain collectives: there, take the rows by indexing.

    Args:
      table: in the dtype of its rows.
      tokens: ids; an id outside the vocabulary gives a row of NaN.
    """
    return _rows(len(table), *alike((table, tokens)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(vocab: int, table: Array, tokens: Array) -> Array:
    del vocab
    return table.at[tokens].get(**NAN_OUTSIDE)


def _rows_forward(vocab: int, table: Array, tokens: Array) -> tuple[Array, Array]:
    return _rows(vocab, table, tokens), tokens


def _rows_backward(vocab: int, tokens: Array, d_rows: Array) -> tuple[Array, None]:
    def zeros(d_rows: Array) -> Array:
        return alike((jnp.zeros((vocab, d_rows.shape[-1]), d_rows.dtype), d_rows))[0]

    def added(d_rows: Array) -> Array:
        return zeros(d_rows).at[tokens].add(d_rows, mode="drop", wrap_negative_indices=False)

    return lax.cond(jnp.any(d_rows != 0), added, zeros, d_rows), None


_rows.defvjp(_rows_forward, _rows_backward)


class CausalConv(nnx.Module):
    """Depthwise convolution over a token and the ``width - 1`` before it, then SiLU.

    Args:
      features: channels, d.
      width: taps; the last one multiplies the token itself.
      kernel_init: initialiser of the (width, d) kernel.
      use_bias: whether channels have a bias, zero at first.
      param_dtype: dtype of the parameters.
      rngs: random keys.
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        kernel_init: jax.nn.initializers.Initializer,
        use_bias: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        init = partitioned(kernel_init, None, "heads")
        self.kernel = nnx.Param(init(rngs.params(), (width, features), param_dtype))
        self.use_bias = use_bias
        if use_bias:
            init = partitioned(jax.nn.initializers.zeros, "heads")
            self.bias = nnx.Param(init(rngs.params(), (features,), param_dtype))

    def init_tail(self, batch_size: int, dtype: DTypeLike) -> Float[Array, "b past d"]:
        """Returns the inputs before the first token, all zero, for ``extend``."""
        width, features = self.kernel.shape
        return jnp.zeros((batch_size, width - 1, features), dtype)

    def extend(
        self,
        x: Float[Array, "b t d"],
        tail: Float[Array, "b past d"],
        lengths: Int[Array, "b"],
        division: Division | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b past d"]]:
        """Continues a stream.

        Args:
          x: the next tokens.
          tail: the ``width - 1`` inputs before them.
          lengths: how many of each row's tokens count, from the first on.
          division: how the tokens lie on a mesh, channels as heads.

        Returns:
          The outputs, and each row's last ``width - 1`` inputs.
        """

        def extend(x: Array, tail: Array, lengths: Array, kernel: Array) -> tuple[Array, Array]:
            past = tail.shape[1]
            inputs = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
            y = conv_silu(inputs, kernel.astype(x.dtype), self.use_bias)[:, past:]
            last = jax.vmap(lambda row, begin: jax.lax.dynamic_slice_in_dim(row, begin, past))
            return y, last(inputs, lengths).astype(tail.dtype)

        args = x, tail, lengths, self._taps()
        if division is None:
            return extend(*args)
        letters = "b . h", "b . h", "b", ". h"
        return division.run(extend, args, letters, letters[:2])

    def __call__(
        self,
        x: Float[Array, "b t d"],
        document_ids: Int[Array, "b t"] | None = None,
        division: Division | None = None,
    ) -> Float[Array, "b t d"]:
        """y_t = silu(sum over j of kernel[j] x_{t - width + 1 + j} + bias), within t's document."""
        kernel, before = self._taps().astype(x.dtype), self.kernel.shape[0] - 1
        rows = () if document_ids is None else (document_ids,)
        conv = functools.partial(document_conv_silu if rows else conv_silu, biased=self.use_bias)
        args, letters = (x, kernel, *rows), ("b t h", ". h", "b t")[: 2 + len(rows)]
        return over_time(conv, args, letters, before=before, division=division)

    def _taps(self) -> Float[Array, "w d"]:
        """The kernel, with the bias as its last row."""
        if not self.use_bias:
            return self.kernel[...]
        return jnp.concatenate([self.kernel[...], self.bias[...][None]])


class SwiGLU(nnx.Module):
    """Gated MLP, scale W_down(silu(gate_scale W_gate x) * W_up x) (arXiv:2002.05202)."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        use_bias: bool = False,
        gate_scale: float = 1.0,
        scale: float = 1.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = dict(
            use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.gate_scale, self.scale = gate_scale, scale
        self.gate = Linear(features, hidden, axes=("embed", "mlp"), **options)
        self.up = Linear(features, hidden, axes=("embed", "mlp"), **options)
        self.down = Linear(hidden, features, axes=("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Applies the MLP to every token."""
        gate = self.gate(x)
        gate = gate if self.gate_scale == 1 else self.gate_scale * gate
        y = self.down(jax.nn.silu(gate) * self.up(x))
        return y if self.scale == 1 else self.scale * y


def product_sharding(x: Array, matrix: Any, axis: int) -> NamedSharding | None:
    """The layout of a product, whose last axis is this one of the matrix; None if no type shows it.

    It is divided as ``x`` is, and its last axis as the matrix is.
    """
    mesh = context_mesh(x)
    if mesh is None or not explicit_axes(mesh):
        return None
    *rows, _ = axes_of(x)
    # A quantised matrix is no array.
    last = axes_of(matrix)[axis] if isinstance(matrix, jax.Array) else ()
    used = {axis for axes in rows for axis in axes}
    return NamedSharding(mesh, as_spec([*rows, tuple(a for a in last if a not in used)]))


def as_laid(x: Array) -> NamedSharding | None:
    """The layout that an array's type shows, as an ``out_sharding``; None if it shows none."""
    mesh = context_mesh(x)
    if mesh is None or not explicit_axes(mesh):
        return None
    return NamedSharding(mesh, as_spec(axes_of(x)))


def l2_normalize(x: Float[Array, "... k"], epsilon: float = 1e-6) -> Float[Array, "... k"]:
    """Returns x / |x| along the last axis, computed in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    norm = jax.lax.rsqrt(jnp.vecdot(wide, wide, precision="highest") + epsilon)
    return jnp.einsum("...k,...->...k", wide, norm, precision="highest").astype(x.dtype)


def copy_of(param: nnx.Param) -> Any:
    """An initialiser that returns a copy of another parameter, so that both can be donated."""
    return lambda key, shape, dtype: jnp.array(param[...], dtype)


def is_adapted(layer: nnx.Module) -> bool:
    """Whether a library such as qwix has attached adapters: they act only where it is called."""
    return any(isinstance(part, nnx.LoRAParam) for part in vars(layer).values())
