"""Multi-head latent attention: heads of keys and values are made of one latent row per token."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from memcache_jax import _checks
from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn.attend import AttentionCache, SharedCache
from memcache_jax.nn.attention import Attention
from memcache_jax.nn.layers import Linear, is_adapted
from memcache_jax.nn.norms import Norm
from memcache_jax.sharding.division import Division


@dataclasses.dataclass(frozen=True)
class LatentAttentionMixer:
    """Blocks mix tokens with ``LatentAttention``.

    Attributes:
      num_heads: heads.
      key_dim: channels of a head's keys that are made of the latent row.
      shared_dim: channels of keys that all heads share, beside them.
      value_dim: channels of a head's values.
      rank: channels of the latent row, from which keys and values are made.
      query_rank: channels between a query's two projections; None for one projection.
      norm: of the latent rows.
      use_bias: whether the projections to latent rows and the output have a bias.
    """

    num_heads: int
    key_dim: int
    shared_dim: int
    value_dim: int
    rank: int
    query_rank: int | None = None
    norm: Norm = Norm()
    use_bias: bool = False

    def __post_init__(self) -> None:
        sizes = "num_heads", "key_dim", "shared_dim", "value_dim", "rank", "query_rank"
        _checks.check_fields(self, sizes=sizes, flags=("use_bias",), optional=("query_rank",))
        _checks.check_instance("norm", self.norm, Norm, "an mc.nn.Norm")

    def build(
        self,
        in_features: int,
        num_heads: int | None = None,
        *,
        head_dim: Any = None,
        **options: Any,
    ) -> "LatentAttention":
        """Returns the layer."""
        del num_heads, head_dim
        return LatentAttention(self, in_features, **options)


class LatentAttention(Attention):
    """Causal multi-head latent attention without positions (MLA, arXiv:2405.04434).

    A token has a latent row c and a row r that heads share. Head h has the key [K_h c, r] and the
    value V_h c. A stream keeps [c, r] alone and reads it by queries [K_h^T q, q_r]: the scores are
    the same, and V_h is applied to their sum.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> mixer = mc.nn.LatentAttentionMixer(4, key_dim=8, shared_dim=4, value_dim=6, rank=16)
      >>> layer = mixer.build(32, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 10, 32))).shape, layer.init_cache(1, 10).key.shape
      ((1, 10, 32), (1, 1, 10, 20))
    """

    _kept: ClassVar[type[AttentionCache]] = SharedCache
    _keeps_values: ClassVar[bool] = False

    def __init__(
        self,
        mixer: LatentAttentionMixer,
        in_features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.mixer, self.in_features = mixer, _checks.check_integer("in_features", in_features)
        self.num_heads = self.num_kv_heads = heads = mixer.num_heads
        self.of_query = mixer.key_dim + mixer.shared_dim
        self.head_dim = max(self.of_query, mixer.value_dim)
        self.window = self.implementation = None
        self.dtype, self.param_dtype = dtype, param_dtype
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        biased: dict[str, Any] = options | dict(use_bias=mixer.use_bias)
        source, down = in_features, ("embed", None)
        if mixer.query_rank is not None:
            source = mixer.query_rank
            self.query_down = Linear(in_features, source, axes=down, **biased)
            self.query_norm = mixer.norm.build(source, **options)
        self.query = Linear(source, heads * self.of_query, axes=("embed", "heads"), **options)
        self.down = Linear(in_features, mixer.rank + mixer.shared_dim, axes=down, **biased)
        self.norm = mixer.norm.build(mixer.rank, **options)
        made = heads * (mixer.key_dim + mixer.value_dim)
        self.up = Linear(mixer.rank, made, axes=(None, "heads"), **options)
        self.out = Linear(heads * mixer.value_dim, in_features, axes=("heads", "embed"), **biased)

    def _latent(self, x: Float[Array, "b t d"]) -> tuple[Array, Array, Array]:
        """Queries of all heads side by side, latent rows, and the rows that heads share."""
        query = x
        if self.mixer.query_rank is not None:
            query = self.query_norm(self.query_down(x))
        latent, shared = jnp.split(self.down(x), [self.mixer.rank], axis=-1)
        return self.query(query), self.norm(latent), shared

    def _rows(
        self, x: Float[Array, "b t d"], *others: tuple[Any, str]
    ) -> tuple[list, Division | None]:
        query, latent, shared = self._latent(x)
        made = self.up(latent)
        args, letters = (query, made, shared), ("b t h", "b t h", "b t .")
        pairs = zip((query, made), letters, strict=False)
        division = Division.of(*pairs, *others, heads=self.num_heads)
        division = None if division is None else division.even(x.shape[1])
        if division is None:
            return list(self._heads(*args)), None
        row = "b t h ."
        return list(division.run(self._heads, args, letters, (row, row, row))), division

    def _heads(self, query: Array, made: Array, shared: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of each head, filled up to equal channels."""
        mixer, shape = self.mixer, query.shape[:2]
        scale = (self.head_dim / self.of_query) ** 0.5  # attention scales by its channels
        query = scale * query.reshape(*shape, -1, self.of_query)
        key, value = jnp.split(
            made.reshape(*shape, -1, mixer.key_dim + mixer.value_dim), [mixer.key_dim], axis=-1
        )
        shared = jnp.broadcast_to(shared[:, :, None], (*key.shape[:3], mixer.shared_dim))

        def filled(x: Array) -> Array:
            return jnp.pad(x, [(0, 0)] * 3 + [(0, self.head_dim - x.shape[-1])])

        return filled(query), filled(jnp.concatenate([key, shared], axis=-1)), filled(value)

    def _turn(
        self, rows: Float[Array, "b t h k"], position: Int[Array, "_ t"] | None
    ) -> Float[Array, "b t h k"]:
        del position
        return rows

    def _output(self, x: Float[Array, "b t d"], y: Float[Array, "b t h k"]) -> Array:
        return super()._output(x, y[..., : self.mixer.value_dim])

    @property
    def _kept_shape(self) -> tuple[int, int]:
        return 1, self.mixer.rank + self.mixer.shared_dim

    def _next_rows(
        self, x: Float[Array, "b t d"], *others: tuple[Any, str]
    ) -> tuple[list, Division | None, Array]:
        query, latent, shared = self._latent(x)
        key = jnp.concatenate([latent, shared], axis=-1)
        division = Division.of((query, "b . h"), *others, heads=self.num_heads)
        if division is not None:
            query, key = division.lay(query, "b . h"), division.lay(key, "b . .")
        query = query.reshape(*x.shape[:2], self.num_heads, -1)
        of_latent, of_shared = jnp.split(query, [self.mixer.key_dim], axis=-1)
        keys, values = self._kernels(query.dtype, division)
        of_latent = jnp.einsum("bthk,chk->bthc", of_latent, keys)
        scale = (self._kept_shape[1] / self.of_query) ** 0.5
        rows = scale * jnp.concatenate([of_latent, of_shared], axis=-1)
        return [rows, key[:, :, None], None], division, values

    def _next_output(
        self, x: Float[Array, "b t d"], y: Float[Array, "b t h c"], kept: Float[Array, "r h v"]
    ) -> Array:
        y = jnp.einsum("bthc,chv->bthv", y[..., : self.mixer.rank], kept)
        return super()._output(x, y)

    def _kernels(self, dtype: Any, division: Division | None) -> list[Array]:
        """From a latent row to each head's keys and values, (c, h, k) and (c, h, v)."""
        if is_adapted(self.up):
            # A call draws one dropout mask, so that keys and values are of one kernel.
            kernel = self.up(jnp.eye(self.mixer.rank, dtype=dtype)).astype(dtype)
        else:
            kernel = self.up.kernel[...].astype(dtype)
            if self.up.low_rank is not None:
                kernel += self.up.low_rank.matrix().astype(dtype)
        if division is not None:
            kernel = division.lay(kernel, ". h")
        kernel = kernel.reshape(self.mixer.rank, self.num_heads, -1)
        return jnp.split(kernel, [self.mixer.key_dim], axis=-1)
