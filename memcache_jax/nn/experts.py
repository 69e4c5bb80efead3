"""Sparse experts: each token goes to a few of many MLPs."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memcache_jax import _checks
from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.layers import Linear, SwiGLU
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import MeshAxes, like
from memcache_jax.sharding.names import partitioned


@dataclasses.dataclass(frozen=True)
class Experts:
    """Sparse experts: each token goes to ``top_k`` of them (arXiv:1701.06538), and to a shared one.

    y = sum over the top experts of p_e(x) mlp_e(x) + s(x) shared(x), each a ``GatedMLP``.

    On a mesh a device works with its own channels of each expert. Where the type of the kernels, or
    a rule for ``experts``, gives experts an axis of the mesh, it has its own experts, for which it
    takes the rows of all devices along that axis; the outputs are then summed over it.

    Attributes:
      num_experts: experts that the router chooses among.
      top_k: how many it chooses for a token.
      hidden: channels of each.
      shared_hidden: channels of the shared one; None for no shared one.
      probabilities: p is the ``"softmax"`` over all experts, or over the ``"top"`` alone, which
        sums to one, or the ``"sigmoid"`` of each.
      normalize: whether the probabilities of the top are divided by their sum.
      scale: a factor of the probabilities.
      selection_bias: whether a learned number of each expert is added where the top are chosen, and
        only there (arXiv:2408.15664). It has no gradient.
      groups: groups of experts, of which ``top_groups`` are chosen first, by the sum of their two
        best (arXiv:2412.19437).
      top_groups: how many groups.
      shared_gate: whether s(x) = sigmoid(x w); else 1.
    """

    num_experts: int
    top_k: int
    hidden: int
    shared_hidden: int | None = None
    probabilities: Literal["softmax", "top", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    selection_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    shared_gate: bool = False

    def __post_init__(self) -> None:
        _checks.check_fields(
            self,
            sizes=("num_experts", "top_k", "hidden", "shared_hidden", "groups", "top_groups"),
            numbers=("scale",),
            flags=("normalize", "selection_bias", "shared_gate"),
            optional=("shared_hidden",),
        )
        _checks.check_choice("probabilities", self.probabilities, ("softmax", "top", "sigmoid"))
        if self.num_experts % self.groups or self.top_groups > self.groups:
            raise ValueError(
                f"groups={self.groups} must divide num_experts={self.num_experts} and not be fewer "
                f"than top_groups={self.top_groups}"
            )
        among = self.num_experts // self.groups * self.top_groups
        if self.top_k > among:
            raise ValueError(f"top_k={self.top_k} exceeds the {among} experts of {self}")

    def build(self, features: int, **options: Any) -> "SparseExperts":
        """Returns the module."""
        return SparseExperts(self, features, **options)


class SparseExperts(nnx.Module):
    """The module of ``Experts``; kernels of all experts are stacked, (e, in, out)."""

    def __init__(
        self,
        experts: Experts,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.experts, self.dtype = experts, dtype
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        wide = options  # near ties of many sigmoids need float32
        if experts.probabilities == "sigmoid":
            wide = options | dict(dtype=jnp.float32, param_dtype=jnp.float32)
        self.router = Linear(features, experts.num_experts, axes=("embed", "experts"), **wide)
        if experts.selection_bias:
            zeros = partitioned(jax.nn.initializers.zeros, "experts")
            bias = zeros(rngs.params(), (experts.num_experts,), jnp.float32)
            self.selection_bias = nnx.Param(bias)

        def kernels(size_in: int, size_out: int, *axes: str) -> nnx.Param:
            init = jax.nn.initializers.lecun_normal(batch_axis=(0,))
            shape = experts.num_experts, size_in, size_out
            init = partitioned(init, "experts", *axes)
            return nnx.Param(init(rngs.params(), shape, param_dtype))

        self.gate = kernels(features, experts.hidden, "embed", "mlp")
        self.up = kernels(features, experts.hidden, "embed", "mlp")
        self.down = kernels(experts.hidden, features, "mlp", "embed")
        if experts.shared_hidden is not None:
            self.shared = SwiGLU(features, experts.shared_hidden, **options)
            if experts.shared_gate:
                self.shared_gate = Linear(features, 1, axes=("embed", None), **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Applies to every token the experts that it is routed to."""
        kernels = [kernel[...] for kernel in (self.gate, self.up, self.down)]
        dtype = self.dtype or jnp.result_type(x.dtype, kernels[0].dtype)
        args = x.astype(dtype), self.router(x), *(kernel.astype(dtype) for kernel in kernels)
        division = Division.of((x, "b t ."), (kernels[0], "e . h"))
        division = None if division is None else division.even(x.shape[1])
        if division is None:
            y = self._routed(*args)
        else:  # a device has its own tokens, its own experts, and its own channels of each
            routed = functools.partial(self._routed, channels=division.h, experts=division.e)
            row, into = "b t .", "e . h"
            y = like(x, division.run(routed, args, (row, row, into, into, "e h ."), row))
        if self.experts.shared_hidden is None:
            return y
        shared = self.shared(x)
        if self.experts.shared_gate:
            shared = shared * jax.nn.sigmoid(self.shared_gate(x))
        return y + shared

    def _routed(
        self,
        x: Float[Array, "b t d"],
        logits: Float[Array, "b t e"],
        gate: Float[Array, "own d f"],
        up: Float[Array, "own d f"],
        down: Float[Array, "own f d"],
        channels: MeshAxes = (),
        experts: MeshAxes = (),
    ) -> Float[Array, "b t d"]:
        """The experts' outputs, summed over the axes that divide channels, or experts."""
        weights, chosen = self._route(logits.reshape(-1, logits.shape[-1]))
        if experts:
            chosen -= len(gate) * lax.axis_index(experts)

        def mlp(rows: Array, expert: Array) -> Array:
            hidden = jax.nn.silu(rows @ gate[expert]) * (rows @ up[expert])
            return hidden @ down[expert]

        even = max(chosen.size // self.experts.num_experts, 1)
        block = min(even, 128)
        out = over_groups(mlp, x.reshape(-1, x.shape[-1]), chosen, len(gate), block)
        y = jnp.einsum("nkd,nk->nd", out, weights.astype(out.dtype)).reshape(x.shape)
        if not channels + experts:
            return y
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        return lax.psum(wide, channels + experts).astype(y.dtype)

    def _route(self, logits: Float[Array, "n e"]) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        """The weight of each token's experts, and which they are."""
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        experts = self.experts
        if experts.probabilities == "sigmoid":
            scores = jax.nn.sigmoid(logits)
        else:  # the top of the logits are those of their softmax
            scores = logits if experts.probabilities == "top" else jax.nn.softmax(logits)
        _, chosen = lax.top_k(self._selection(scores), experts.top_k)
        top = jnp.take_along_axis(scores, chosen, axis=-1)
        if experts.probabilities == "top":
            top = jax.nn.softmax(top)
        elif experts.normalize:
            top = top / (jnp.sum(top, axis=-1, keepdims=True) + 1e-20)
        return top if experts.scale == 1 else experts.scale * top, chosen

    def _selection(self, scores: Float[Array, "n e"]) -> Float[Array, "n e"]:
        """The scores by which experts are chosen."""
        experts = self.experts
        if experts.selection_bias:
            bias = self.selection_bias[...].astype(scores.dtype)
            scores = lax.stop_gradient(scores + bias[None])
        if experts.groups == experts.top_groups:
            return scores
        grouped = scores.reshape(len(scores), experts.groups, -1)
        best, _ = lax.top_k(grouped, min(2, grouped.shape[-1]))
        _, chosen = lax.top_k(jnp.sum(best, axis=-1), experts.top_groups)
        kept = jnp.any(chosen[..., None] == jnp.arange(experts.groups)[None, None], axis=1)
        return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


def over_groups(
    f: Any, rows: Float[Array, "n d"], groups: Int[Array, "n k"], count: int, block: int
) -> Float[Array, "n k d"]:
    """Returns f(rows[i], groups[i, j]) for all i, j, in blocks of rows of one group.

    It is zero for a group that is not in [0, count), for which nothing is done.

    The rows of a group fill whole blocks, so that the work is that of n k rows and at most one
    block more for each group, wherever they go.

    Args:
      f: a function of rows (block, d) and the number of their group.
      rows: the rows.
      groups: the groups of each.
      count: number of groups.
      block: rows in a block.
    """
    n, k = groups.shape
    flat = jnp.where((groups >= 0) & (groups < count), groups, count).reshape(-1)
    blocks = -(-n * k // block) + min(count, n * k)
    sizes = jnp.zeros(count, jnp.int32).at[flat].add(1)
    needed = -(-sizes // block)  # blocks of each group
    ends = jnp.cumsum(needed)
    order = jnp.argsort(flat, stable=True)
    rank = jnp.zeros(n * k, jnp.int32).at[order].set(jnp.arange(n * k))
    within = rank - (jnp.cumsum(sizes) - sizes)[flat]
    place = (ends - needed)[flat] * block + within
    place = jnp.where(flat < count, place, blocks * block)  # beyond the end: nowhere
    source = jnp.full(blocks * block, n).at[place].set(jnp.arange(n * k) // k)
    filled = rows.at[source].get(mode="fill", fill_value=0).reshape(blocks, block, -1)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side="right"), count - 1)
    used = jnp.arange(blocks) < ends[-1]

    def one(_: None, given: tuple) -> tuple[None, Array]:
        x, group, is_used = given
        return None, lax.cond(is_used, f, lambda x, _: jnp.zeros_like(x), x, group)

    _, out = lax.scan(one, None, (filled, owner, used))
    out = out.reshape(blocks * block, -1).at[place].get(mode="fill", fill_value=0)
    return out.reshape(n, k, -1)
