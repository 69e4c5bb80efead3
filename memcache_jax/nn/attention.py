"""Causal self-attention with rotary positions: the mixer of the Transformer++ baseline."""

import functools
from typing import Any, ClassVar, Literal, Unpack

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from memcache_jax import _checks
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax.engine.documents import count_documents
from memcache_jax.nn.attend import AttentionCache, attend_causally, attend_stream
from memcache_jax.nn.calls import MixerCall, answer, read_mixer_call
from memcache_jax.nn.host_options import HostOptions, read_host_options
from memcache_jax.nn.layers import Linear, as_laid
from memcache_jax.nn.rotary import rotate
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import axes_of, by_compiler
from memcache_jax.sharding.names import AxisNames, naming
from memcache_jax.streaming import check_options
from memcache_jax.streaming.protocol import placed


def check_attention(window: Any, rope_base: Any, implementation: Any) -> tuple[Any, Any]:
    """Returns the window and the base, or raises ValueError for what no layer can have."""
    _checks.check_choice("implementation", implementation, (None, "xla", "cudnn"))
    window = _checks.check_integer("window", window, optional=True)
    wanted = "a finite number > 0"
    return window, float(_checks.check_number("rope_base", rope_base, wanted, lambda x: x > 0))


class Attention(nnx.Module):
    """Causal softmax attention with RoPE, over all past tokens or a sliding window.

    y_t = sum over j <= t of softmax_j(<R_t q_t, R_j k_j> / sqrt(k)) v_j in each head, with the
    rotations R of arXiv:2104.09864.

    Args:
      in_features: model dimension d.
      num_heads: heads h.
      head_dim: dimension of a head, even; ``in_features // num_heads`` by default.
      window: how many tokens a token sees, itself included; None for all. Its memory grows as the
        tokens do.
      rope_base: wavelength base of the rotary embedding.
      implementation: of whole sequences, ``"xla"`` or ``"cudnn"``, which is for bfloat16 on NVIDIA
        GPUs and needs no memory that is quadratic in their length; JAX's default where it is None.
        Streams are XLA's.
      dtype: dtype of the arithmetic; by default the wider of the input's and ``param_dtype``.
      param_dtype: dtype of the parameters.
      axis_names: what the host calls the axes of parameters, as in ``MemoryCaching``.
      rngs: random keys.
      host: what hosts pass to attention, such as ``kernel_init`` and ``use_bias``: see
        ``HostOptions``.

    Raises:
      TypeError: for an unknown keyword.
      ValueError: for head sizes that do not fit, a window below 1, an unknown implementation, or
        what a host asks for and the layer does not do.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> mc.nn.Attention(64, 4, window=32, rngs=nnx.Rngs(0))(jnp.ones((2, 100, 64))).shape
      (2, 100, 64)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        window: int | None = None,
        rope_base: float = 10_000.0,
        implementation: Literal["xla", "cudnn"] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        axis_names: AxisNames | None = None,
        rngs: nnx.Rngs,
        **host: Unpack[HostOptions],
    ) -> None:
        in_features, num_heads = _checks.check_sizes(in_features=in_features, num_heads=num_heads)
        self.in_features, self.num_heads = in_features, num_heads
        _checks.check_dtype("dtype", dtype, optional=True)
        _checks.check_dtype("param_dtype", param_dtype)
        name = type(self).__name__
        self.head_dim, of = read_host_options(name, in_features, num_heads, head_dim, **host)
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")
        self.num_kv_heads = num_heads
        self.window, self.rope_base = check_attention(window, rope_base, implementation)
        self.implementation: Literal["xla", "cudnn"] | None = implementation
        self.dtype, self.param_dtype = dtype, param_dtype
        inner = num_heads * self.head_dim
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        with naming(axis_names):
            self.query, self.key, self.value = (
                Linear(in_features, inner, axes=("embed", "heads"), **options, **of.inputs)
                for _ in range(3)
            )
            self.out = Linear(inner, in_features, axes=("heads", "embed"), **options, **of.out)

    def __call__(
        self,
        x: Float[Array, "b t d"] | None = None,
        document_ids: Int[Array, "b t"] | Float[Array, "b t d"] | None = None,
        inputs_v: Float[Array, "b t d"] | None = None,
        *,
        cache: AttentionCache | None = None,
        **call: Unpack[MixerCall],
    ) -> Any:
        """Mixes tokens causally.

        Args:
          x: the input.
          document_ids: for documents packed into one sequence, an id per token: a document
            begins where it changes, and tokens see only their own document.
          inputs_v: None or x, and ``document_ids`` may be x, for hosts that call attention so.
          cache: continues a stream, as ``extend`` does.
          call: what hosts pass to attention, such as ``segment_ids``, ``positions``, ``mask`` and
            ``deterministic``: see ``MixerCall``. A window narrows any mask.

        Returns:
          The output, of x's shape; with a cache, also the cache after these tokens. Where a traced
          mask or traced positions ask for what the layer does not do, NaN.

        Raises:
          ValueError: for an input that is not (b, t, in_features), document_ids that are not
            integers (b, t), both document_ids and a cache, or a mask of later tokens.
        """
        x, read = read_mixer_call(
            x, document_ids, inputs_v, self.num_heads, self.in_features, **call
        )
        if cache is not None:
            _checks.check_cache(cache, AttentionCache, self._kept_shape)
        return answer(read, x, cache, whole=self._whole, extend=self.extend, takes_masks=True)

    def _whole(
        self,
        x: Float[Array, "b t d"],
        document_ids: Int[Array, "b t"] | None,
        mask: Bool[Array, "_ _ t t"] | None = None,
    ) -> Float[Array, "b t d"]:
        if 0 in x.shape[:2]:
            return self.out(self.value(x))
        document = document_ids
        (query, key, value), division = self._rows(x, (document_ids, "b t"))
        if document is not None:
            document = by_compiler(count_documents, document, axes=axes_of(document))
        attend = functools.partial(
            attend_causally,
            window=self.window,
            turn=self._turn,
            implementation=self.implementation,
            division=division,
        )
        args, row, of_mask = (query, key, value, document, mask), "b t h .", None
        if mask is not None:
            of_mask = f"{'b' if len(mask) > 1 else '.'} {'h' if mask.shape[1] > 1 else '.'} t ."
        letters = row, row, row, "b t", of_mask
        y = attend(*args) if division is None else division.run(attend, args, letters, row)
        return self._output(x, y)

    def init_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        sharding: NamedSharding | PartitionSpec | None = None,
        **options: Any,
    ) -> AttentionCache:
        """Returns an empty cache for ``extend``.

        Args:
          batch_size: number of rows.
          max_length: most tokens per row; not needed with a window.
          sharding: how rows and heads are divided, as in ``mc.init_cache``.
          options: those of ``MemoryCaching``, of which ``rewind`` alone has an effect here: a
            window keeps as many tokens more.

        Raises:
          ValueError: for sizes below 1, or without both a window and ``max_length``.
        """
        batch_size = _checks.check_integer("batch_size", batch_size)
        max_length = _checks.check_integer("max_length", max_length, optional=True)
        check_options(options)
        if self.window is None and max_length is None:
            raise ValueError("attention without a window keeps all tokens: give max_length")
        rewind = _checks.check_integer("rewind", options.get("rewind", 0), 0)
        past: Any = max_length if self.window is None else self.window - 1 + rewind
        dtype = self.param_dtype if self.dtype is None else self.dtype
        heads, dim = self._kept_shape

        def empty() -> AttentionCache:
            key, value = (jnp.zeros((batch_size, heads, past, dim), dtype) for _ in range(2))
            position = jnp.zeros(batch_size, jnp.int32)
            return self._kept(
                key,
                value if self._keeps_values else None,
                position,
                jnp.zeros(batch_size, jnp.int32) if rewind else None,
                rewind_most=rewind,
                is_window=self.window is not None,
            )

        return placed(empty, sharding)

    def extend(
        self,
        x: Float[Array, "b t d"],
        cache: AttentionCache,
        lengths: Int[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b t out"], AttentionCache]:
        """Continues a stream: its outputs are those of one call on the whole sequence.

        Args:
          x: the next tokens.
          cache: from ``init_cache`` or the previous call.
          lengths: how many of each row's tokens count, from the first on; all by default.

        Returns:
          The outputs, and the cache after these tokens. Tokens beyond a row's room, which without
          a ``max_length`` is 2^31 - 1 tokens, give NaN.

        Raises:
          ValueError: for an input that is not (b, t, in_features), or does not fit the cache or,
            outside ``jit``, the room of its rows.
        """
        _checks.check_input(x, self.in_features)
        _checks.check_cache(cache, AttentionCache, self._kept_shape)
        length, past = x.shape[1], cache.key.shape[-2]
        last = past - cache.rewind_most
        if self.window is not None and last != self.window - 1:
            raise ValueError(
                f"the cache must hold the last {self.window - 1} tokens for window={self.window}, "
                f"it holds {last}"
            )
        limit = past if self.window is None else None
        _checks.check_room(cache.position, x.shape[:2], lengths, limit)
        lengths = jnp.full(len(x), length, jnp.int32) if lengths is None else jnp.asarray(lengths)
        (query, key, value), division, kept = self._next_rows(x, (cache.position, "b"))
        extend = functools.partial(attend_stream, window=self.window, turn=self._turn)
        persistent = self._persistent()
        args = cache, query, key, value, lengths, persistent
        if division is None:
            y, cache = extend(*args)
        else:
            row, of_cache = "b . h .", cache.letters()
            of_key = row if "h" in cache.axes.get("key", "") else "b . . ."
            of_value = None if value is None else of_key
            of_persistent = None if persistent is None else (". h .", ". h .")
            letters = of_cache, row, of_key, of_value, "b", of_persistent
            y, cache = division.run(extend, args, letters, (row, of_cache))
        return self._next_output(x, y, kept), cache

    # What a stream keeps and how it attends, which a subclass may override.

    _kept: ClassVar[type[AttentionCache]] = AttentionCache
    _keeps_values: ClassVar[bool] = True

    @property
    def _kept_shape(self) -> tuple[int, int]:
        """Heads and channels of what a stream keeps of a token."""
        return self.num_kv_heads, self.head_dim

    def _persistent(self) -> tuple[Array, Array] | None:
        """Keys and values that all tokens see, (p, h, k)."""
        return None

    def _next_rows(
        self, x: Float[Array, "b t d"], *others: tuple[Any, str]
    ) -> tuple[list, Division | None, Any]:
        """As ``_rows``, of a stream's next tokens, and what ``_next_output`` needs beside them."""
        return *self._rows(x, *others), None

    def _next_output(
        self, x: Float[Array, "b t d"], y: Float[Array, "b t h k"], kept: Any
    ) -> Array:
        """As ``_output``, of what ``_next_rows`` read."""
        return self._output(x, y)

    def _turn(
        self, rows: Float[Array, "b t h k"], position: Int[Array, "_ t"] | None
    ) -> Float[Array, "b t h k"]:
        return rotate(rows, self.rope_base, position)

    def _output(self, x: Float[Array, "b t d"], y: Float[Array, "b t h k"]) -> Array:
        return self.out(y.reshape(*x.shape[:2], -1), as_laid(x))

    def _rows(
        self, x: Float[Array, "b t d"], *others: tuple[Any, str]
    ) -> tuple[list[Array], Division | None]:
        """Queries, keys and values, and how they and ``others`` lie on a mesh."""
        rows = [linear(x) for linear in (self.query, self.key, self.value)]
        tokens = ((row, "b t h") for row in rows)
        division = Division.of(*tokens, *others, heads=self.num_kv_heads)
        if division is not None:
            division = division.even(x.shape[1])
        if division is not None:
            rows = [division.lay(row, "b t h") for row in rows]
        return [row.reshape(*x.shape[:2], -1, self.head_dim) for row in rows], division
