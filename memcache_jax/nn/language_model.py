"""A decoder-only language model whose blocks mix tokens by memory caching or by attention."""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from memcache_jax import _checks
from memcache_jax._checks import (
    check_instance,
    check_integer,
    check_tokens,
    without_padding,
)
from memcache_jax._typing import Array, Float, Int
from memcache_jax.kernels._dispatch import ROUTED, WRITTEN
from memcache_jax.nn import period
from memcache_jax.nn.block import Between, Hidden, Period, stream_of
from memcache_jax.nn.calls import ModelCall, answer, read_call
from memcache_jax.nn.config import LanguageModelConfig
from memcache_jax.nn.layers import NAN_OUTSIDE, Embed, Linear, rows_of
from memcache_jax.nn.model_cache import LanguageModelCache
from memcache_jax.nn.output import Output
from memcache_jax.nn.stack import layer_of, make_stack, scan_stack
from memcache_jax.sharding.layout import (
    as_spec,
    axes_of,
    context_mesh,
    explicit_axes,
    lay_out,
)
from memcache_jax.sharding.names import AxisNames, constrain, naming, partitioned
from memcache_jax.streaming.protocol import placed

_OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[WRITTEN],
    offload_src="device",
    offload_dst="pinned_host",
)
_KEEP = jax.checkpoint_policies.save_only_these_names(WRITTEN, ROUTED)


class LanguageModel(Output, nnx.Module):
    """Token embedding, a stack of blocks, RMSNorm and an output layer.

    The blocks' parameters are stacked along a first axis and ``lax.scan`` runs over them, so
    compile time does not grow with depth. Blocks that do not repeat one sequence make several
    stacks.

    Args:
      config: the model's shape.
      axis_names: what the host calls the axes of parameters, as in ``MemoryCaching``; here also
        ``"mlp"``, ``"vocab"`` and ``"layers"``.
      rngs: random keys.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> config = mc.nn.LanguageModelConfig(vocab_size=257, num_layers=2, features=64, num_heads=4)
      >>> model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 16), jnp.int32)).shape
      (1, 16, 257)
    """

    published: str | None = None
    """The ``config.json`` that the model was read from, if it was."""

    def __init__(
        self, config: LanguageModelConfig, *, axis_names: AxisNames | None = None, rngs: nnx.Rngs
    ) -> None:
        check_instance("config", config, LanguageModelConfig, "an mc.nn.LanguageModelConfig")
        check_instance("rngs", rngs, nnx.Rngs, "nnx.Rngs, such as nnx.Rngs(0)")
        self.config = config
        options: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.param_dtype)
        size = config.vocab_size, config.features
        with naming(axis_names):
            init = partitioned(jax.nn.initializers.normal(0.02), "vocab", "embed")
            self.embedding = Embed(*size, embedding_init=init, rngs=rngs, **options)
            stacks = [
                make_stack(lambda rngs, own=blocks: Period(config, own, rngs=rngs), repeats, rngs)
                for blocks, repeats in config.stacks
            ]
            self.layers = as_layers(stacks)
            if config.embedding_norm is not None:
                self.embedding_norm = config.embedding_norm.build(
                    config.features, rngs=rngs, **options
                )
            self.norm = config.norm.build(config.features, rngs=rngs, **options)
            if not config.tie_embeddings:
                # Products in a narrower dtype would make ties of logits.
                options["preferred_element_type"] = jnp.promote_types(config.dtype, jnp.float32)
                self.head = Linear(*size[::-1], axes=("embed", "vocab"), rngs=rngs, **options)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        document_ids: Int[Array, "b t"] | None = None,
        *,
        cache: LanguageModelCache | None = None,
        **call: Unpack[ModelCall],
    ) -> Any:
        """Returns the logits of the next token at every position.

        Ids outside the vocabulary, -1 among them, are refused where they are known, and give NaN
        where they are traced under ``jit``.

        Args:
          tokens: token ids.
          document_ids: for documents packed into one row, an id per token: no document sees
            another.
          cache: continues a stream, as ``extend`` does.
          call: what hosts pass to their models, such as ``segment_ids``, ``positions`` (also of
            rows padded on the left), ``mask`` and ``deterministic``: see ``ModelCall``.

        Returns:
          The logits; with a cache, also the cache after these tokens. Where a traced mask or
          traced positions ask for what the model does not do, NaN.

        Raises:
          ValueError: for tokens or document_ids that are not integers of shape (b, t), ids outside
            the vocabulary, both document_ids and a cache, or what memories cannot follow, such as
            masks that are not causal within documents.
        """
        check_tokens(tokens, self.config.vocab_size)
        if cache is not None:
            self._check_cache(cache)
        read = read_call(tokens.shape, document_ids, num_heads=self.config.num_heads, **call)
        answered = answer(read, tokens, cache, whole=self.hidden, extend=self.extend)
        if cache is None:
            return self.logits(answered)
        hidden, cache = answered
        return self.logits(hidden), cache

    def hidden(
        self, tokens: Int[Array, "b t"], document_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Returns the last block's output after the final norm."""
        check_tokens(tokens, self.config.vocab_size)
        wrap = _remat(remat_policy(self.config)) if self.config.remat else None
        x = self._embed(tokens)
        for layers, repeats in self.stacks:
            settle = isinstance(x, Hidden)
            options: dict[str, Any] = dict(constants=document_ids, settle=settle, wrap=wrap)
            x, _ = scan_stack(layers, repeats, period.call, x, **options)
        return self.norm(stream_of(x))

    @property
    def stacks(self) -> list[tuple[Any, int]]:
        """The blocks' modules with stacked parameters, and how many each stands for."""
        repeats = [repeats for _, repeats in self.config.stacks]
        layers: Any = [self.layers] if len(repeats) == 1 else self.layers
        return list(zip(layers, repeats, strict=True))

    def gates(self, tokens: Int[Array, "b t"]) -> list[Any]:
        """Returns ``MemoryCaching.gates`` of every block, or None for blocks of other mixers.

        Where several layers with caches run side by side in a block, as in ``ParallelMixer``, it is
        a dictionary of their gates by name, such as ``"left"`` and ``"right"``.

        Args:
          tokens: token ids.

        Raises:
          ValueError: for tokens that are not integers of shape (b, t).
        """
        check_tokens(tokens, self.config.vocab_size)
        x, found = self._embed(tokens), []
        for layers, repeats in self.stacks:
            x, gates = scan_stack(layers, repeats, period.gates, x, settle=isinstance(x, Hidden))
            for repeat in range(repeats):
                found += jax.tree.map(lambda of_all, repeat=repeat: of_all[repeat], gates)
        return found

    def _embed(self, tokens: Int[Array, "b t"]) -> Between:
        """What the first block is given."""
        x, config = self._rows_of(tokens), self.config
        x = x if config.embedding_scale == 1 else config.embedding_scale * x
        if config.embedding_norm is not None:
            x = self.embedding_norm(x)
        if config.shared_values is None:
            return x
        return Hidden(x, jnp.zeros((*tokens.shape, config.shared_values), x.dtype))

    def _rows_of(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        # Gather the table's features first: on a mesh XLA would otherwise gather the batch.
        table, mesh = self.embedding.embedding[...], context_mesh(tokens)
        if mesh is None:
            return rows_of(table.astype(self.config.dtype), tokens)
        if not explicit_axes(mesh):
            table = constrain(table, "vocab", None)
            x = table.astype(self.config.dtype).at[tokens].get(**NAN_OUTSIDE)
            return constrain(x, "batch", "time", None)
        rows, used = axes_of(tokens), {axis for axes in axes_of(tokens) for axis in axes}
        vocab = tuple(axis for axis in axes_of(table)[0] if axis not in used)
        table = lay_out(table, mesh, [vocab, ()]).astype(self.config.dtype)
        rows = NamedSharding(mesh, as_spec([*rows, ()]))
        return table.at[tokens].get(**NAN_OUTSIDE, out_sharding=rows)

    def init_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        sharding: NamedSharding | PartitionSpec | None = None,
        **options: Any,
    ) -> LanguageModelCache:
        """Returns an empty cache for ``extend``.

        Args:
          batch_size: number of rows.
          max_length: most tokens per row; None if ``options`` bound the memory instead.
          sharding: how rows and heads are divided, as in ``mc.init_cache``.
          options: ``max_segments``, ``policy``, ``cache_dtype`` and ``placement`` of
            ``mc.init_cache``, for memory caching layers; and ``rewind``, by how many tokens
            ``cache.rewind`` takes a row back, for layers of all kinds; and ``keep_ends``, whether
            ``mc.rewind_to`` takes it further, to any token, for which convolutions and token shift
            keep their last inputs at each segment's end.

        Raises:
          ValueError: for sizes below 1, or options that do not fit the layers.
        """
        batch_size = check_integer("batch_size", batch_size)
        max_length = check_integer("max_length", max_length, optional=True)

        def empty() -> LanguageModelCache:
            def init(layer: Period, *_: None) -> tuple[None, list]:
                return None, period.without_states(
                    layer.init_cache(batch_size, max_length, options)
                )

            layers, states, bounds = [], [], [max_length]
            for stack, repeats in self.stacks:
                first: Any = layer_of(stack, repeats, 0)
                one = first.init_cache(batch_size, max_length, options)
                bounds += [getattr(cache, "max_length", None) for cache in one]
                _check_rewindable(one, options)
                layers += scan_stack(stack, repeats, init, None)[1]
                states += [cache.empty_states(batch_size, repeats) for cache in one]
            bounds = [bound for bound in bounds if bound is not None]
            position = jnp.zeros(batch_size, jnp.int32)
            cache = LanguageModelCache(layers, states, position, min(bounds, default=None))
            if options.get("keep_ends"):
                cache.borders(0)
            return cache

        return placed(empty, sharding)

    def extend(
        self,
        tokens: Int[Array, "b t"],
        cache: LanguageModelCache,
        lengths: Int[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], LanguageModelCache]:
        """Returns ``hidden`` of the next tokens of a stream, and the cache after them.

        Args:
          tokens: token ids.
          cache: from ``init_cache`` or the previous call.
          lengths: how many of each row's tokens count, from the first on; all by default. Those
            beyond are padding, of any id.

        Raises:
          ValueError: for tokens that are not integers of shape (b, t), or exceed the cache's rows
            or room. Room cannot be checked under ``jit``: outputs beyond it are NaN.
        """
        self._check_cache(cache)
        check_tokens(tokens, self.config.vocab_size, lengths)
        cache.check_room(tokens.shape, lengths)
        if lengths is not None:
            lengths = jnp.asarray(lengths)
            tokens = without_padding(tokens, lengths)
        x, layers, states = self._embed(tokens), [], []
        for (stack, repeats), (blocks, _) in zip(self.stacks, self.config.stacks, strict=True):
            own = slice(len(layers), len(layers) + len(blocks))
            inputs = cache.layers[own], jnp.arange(repeats)
            carry = x, cache.states[own]
            (x, after), new = scan_stack(
                stack, repeats, period.extend, carry, inputs, lengths, settle=True
            )
            layers, states = layers + new, states + after
        taken = tokens.shape[1] if lengths is None else lengths
        position = _checks.advanced(cache.position, taken)
        hidden = self.norm(stream_of(x))
        return hidden, LanguageModelCache(layers, states, position, cache.max_length)

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, LanguageModelCache):
            raise ValueError(f"the cache must be a LanguageModel's, got {type(cache).__name__}")
        here = tuple(repeats for blocks, repeats in self.config.stacks for _ in blocks)
        if cache.repeats != here:
            raise ValueError(
                f"the cache was made for {sum(cache.repeats)} layers of {len(cache.repeats)} mixers"
                f", this model has {sum(here)} of {len(here)}"
            )


def remat_policy(config: LanguageModelConfig) -> Callable[..., Any] | None:
    """What the backward pass need not recompute of a block, with ``remat``; None for nothing."""
    if config.offload_states:
        return _OFFLOAD
    return _KEEP if config.keep_states else None


@functools.cache  # one object for each policy, by which eager calls know their programs
def _remat(policy: Callable[..., Any] | None) -> Callable[..., Any]:
    return functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)


def _check_rewindable(caches: list, options: dict[str, Any]) -> None:
    """Raises ValueError if caches cannot go back by tokens, where they should."""
    fixed = [type(c).__name__ for c in caches if getattr(c, "rewindable", None) is None]
    if options.get("rewind", 0) and fixed:
        raise ValueError(f"rewind={options['rewind']} needs caches that go back, got {fixed}")


def abstract_model(config: LanguageModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model without its arrays, and the shapes and dtypes of its parameters."""
    # Not nnx.eval_shape, which under a mesh confuses logical axes with those of the mesh.
    return jax.eval_shape(lambda: nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param))


def as_layers(stacks: list) -> Any:
    """What a model keeps of its stacks: the one, or a list of several."""
    return stacks[0] if len(stacks) == 1 else nnx.List(stacks)
