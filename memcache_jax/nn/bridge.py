"""What makes a Linen module of an NNX layer: variables of Linen, run by the NNX layer."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from memcache_jax._checks import check_integer, shown
from memcache_jax._typing import Array
from memcache_jax.nn.host_options import HostOptions, Initializer
from memcache_jax.nn.variables import (
    boxed_values,
    cache_from_dict,
    cache_to_dict,
    values,
    with_values,
)
from memcache_jax.sharding.names import AxisNames
from memcache_jax.streaming.protocol import MixerCache

# A cache is stored under the number of tokens that it has room for. Slots depend on it, so a call
# must know it under jit too, where names are known and arrays are not.
_ROOM = "max_length_"

Arguments: TypeAlias = tuple[tuple[str, Any], ...]
Build: TypeAlias = Callable[[Array], tuple[Any, Any]]


class LinenMixer(linen.Module):
    """A Linen module that runs an NNX layer on its own variables.

    A subclass has a field for each argument of ``nnx_class`` except ``rngs``; of ``HostOptions``,
    those that Linen's attention has too.

    Attributes:
      nnx_class: the NNX layer.
      cache_options: fields that are options of the NNX layer's ``init_cache``.
    """

    nnx_class: ClassVar[Any]
    cache_options: ClassVar[tuple[str, ...]] = ()

    in_features: int | None = None
    num_heads: int | None = None
    _: dataclasses.KW_ONLY
    head_dim: int | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    axis_names: AxisNames | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    kernel_init: Initializer | None = None
    out_kernel_init: Initializer | None = None
    use_bias: bool = False
    bias_init: Initializer | None = None
    out_bias_init: Initializer | None = None
    precision: Any = None
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    deterministic: bool | None = None
    normalize_qk: bool = False
    decode: bool = False
    max_length: int | None = None

    @linen.compact
    def __call__(
        self,
        x: Array | None = None,
        document_ids: Array | None = None,
        *args: Any,
        lengths: Array | None = None,
        dropout_rng: Any = None,
        **kwargs: Any,
    ) -> Array:
        """Mixes tokens causally; with ``decode``, continues the stream of the cache.

        Args:
          x: the input (b, t, d); with ``decode`` the next tokens, any number of them.
          document_ids: for documents packed into one sequence, an id (b, t) per token; not with
            ``decode``.
          args: further arguments of the NNX layer's call.
          lengths: with ``decode``, how many of each row's tokens count, from the first on, (b,);
            all by default.
          dropout_rng: without effect, for there is no dropout.
          kwargs: further arguments of the NNX layer's call, such as ``mask``: see ``MixerCall``.

        Returns:
          The output, of x's shape.

        Raises:
          ValueError: as the NNX layer; for parameters or a cache of other names or shapes than this
            module's; with ``decode``, without a cache or beyond its room. Under ``jit`` room
            cannot be checked: outputs beyond it are NaN.
        """
        del dropout_rng
        given: Any = kwargs.get("inputs_q") if x is None else x
        shape = getattr(given, "shape", ())
        if len(shape) != 3:
            raise ValueError(f"the input must be (b, t, d), got shape {shape}")
        batch, length, features = shape
        own = check_integer("in_features", self.in_features, optional=True)
        features = features if own is None else own
        layer = self._layer(features, self._params(features))
        if not self.decode or self.is_initializing():
            if self.decode:  # makes an empty cache, and takes no token
                room = None if self._bounded else length
                for name, cache in self._empty_cache(features, batch, room).items():
                    self.variable("cache", name, lambda cache=cache: cache)
            elif lengths is not None:
                raise ValueError("lengths are for streams: got them with decode=False")
            return layer(x, document_ids, *args, **kwargs)
        name, cache = self._stored_cache(features, batch)
        if args or kwargs or document_ids is not None:
            if lengths is not None:
                raise ValueError("with lengths, give nothing but the input")
            y, cache = layer(x, document_ids, *args, cache=cache, **kwargs)
        else:
            y, cache = layer.extend(x, cache, lengths)
        self.put_variable("cache", name, cache_to_dict(cache))
        return y

    def take_back(self, tokens: Array) -> None:
        """Takes the last ``tokens`` (b,) of each row back from the cache, as ``MixerCache.rewind``.

        A model's own method calls it for each of its layers.

        Raises:
          ValueError: as ``rewind``; without a cache, or a ``rewind`` of 0.

        Example:
          >>> import jax, jax.numpy as jnp, memcache_jax as mc
          >>> layer = mc.nn.linen.Attention(8, 2, window=4, decode=True, rewind=3)
          >>> x = jnp.ones((2, 9, 8))
          >>> variables = layer.init(jax.random.key(0), x)
          >>> _, changed = layer.apply(variables, x, mutable=["cache"])
          >>> _, changed = layer.apply({**variables, **changed}, jnp.array([3, 1]),
          ...                          method="take_back", mutable=["cache"])
          >>> changed["cache"]["max_length_None"]["position"].tolist()
          [6, 8]
        """
        name, cache = self._stored_cache(self._features, len(tokens))
        self.put_variable("cache", name, cache_to_dict(cache.rewind(tokens)))

    def init_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        sharding: NamedSharding | PartitionSpec | None = None,
    ) -> dict[str, Any]:
        """Returns an empty ``cache`` collection of this module alone, without running it.

        A model with several layers gets all their caches from its own ``init``.

        Args:
          batch_size: number of rows.
          max_length: most tokens per row; by default the field of that name. Both may be None if
            another field bounds the memory.
          sharding: how rows and heads are divided, as in ``mc.init_cache``.

        Returns:
          Nested dictionaries of arrays, each (b, ...) unless ``placement`` is ``"host"``.

        Raises:
          ValueError: as the NNX layer's ``init_cache``; if ``in_features`` is None and the module
            is not bound to parameters.
        """
        return self._empty_cache(self._features, batch_size, max_length, sharding)

    def to_nnx(self) -> Any:
        """Returns the NNX layer with the parameters that this module is bound to.

        It has methods that this module lacks: ``layer.bind(variables).to_nnx().gates(x)``.
        """
        return self._layer(self._features, linen.meta.unbox(self.variables.get("params", {})))

    @property
    def _bounded(self) -> bool:
        """Whether a field bounds the cache."""
        return self.max_length is not None

    @property
    def _features(self) -> int:
        if self.in_features is not None:
            return self.in_features
        params = {} if self.scope is None else self.variables.get("params", {})
        if "query" not in params:
            raise ValueError("set in_features, or bind the module to its parameters: got neither")
        return linen.meta.unbox(params["query"]["kernel"]).shape[0]

    def _builder(self, features: int) -> Build:
        if self.num_heads is None:
            raise ValueError("num_heads must be given, got None")
        taken = {
            *inspect.signature(self.nnx_class.__init__).parameters,
            *HostOptions.__annotations__,
        }
        fields = {field.name for field in dataclasses.fields(self)} - {"in_features", "decode"}
        arguments = self._arguments(tuple(sorted(fields & taken)))
        return _layer_builder(self.nnx_class, features, arguments)

    def _arguments(self, names: tuple[str, ...]) -> Arguments:
        # Linen freezes dictionaries, but not before a module is bound.
        fields = ((name, getattr(self, name)) for name in names)
        arguments = tuple((name, freeze(x) if isinstance(x, dict) else x) for name, x in fields)
        for name, x in arguments:  # by which built layers are kept
            try:
                hash(x)
            except TypeError as error:
                raise ValueError(f"{name} must have a hash, got {shown(x)}") from error
        return arguments

    def _params(self, features: int) -> dict[str, Any]:
        """The parameters, made where they are not there yet."""
        build = self._builder(features)
        shapes, made = values(_shapes_of(build)[1]), {}
        there = all(self.has_variable("params", name) for name in shapes)
        if not there and self.is_mutable_collection("params"):
            # All at once: some start as copies of others.
            made = boxed_values(build(self.make_rng("params"))[1])

        def param(name: str) -> Any:
            # Of parameters that are there, Flax compares the shapes with those of zeros.
            return self.param(name, lambda _: made[name] if made else _zeros(shapes[name]))

        return {name: param(name) for name in shapes}

    def _layer(self, features: int, params: Mapping[str, Any] | None = None) -> Any:
        """The NNX layer with these parameters, or with zeros."""
        graph, state = _shapes_of(self._builder(features))
        given = _zeros(values(state)) if params is None else params
        return nnx.merge(graph, with_values(state, given))

    def _empty_cache(
        self, features: int, batch_size: int, max_length: int | None, sharding: Any = None
    ) -> dict[str, Any]:
        """An empty cache under its name."""
        room = self.max_length if max_length is None else max_length
        options = dict(self._arguments(self.cache_options))
        # A cache takes its weights from the parameters at each call: here they may be zeros.
        cache = self._layer(features).init_cache(batch_size, room, sharding=sharding, **options)
        return {f"{_ROOM}{room}": cache_to_dict(cache)}

    def _stored_cache(self, features: int, batch_size: int) -> tuple[str, MixerCache]:
        """The name and the value of the cache among the variables."""
        stored = self.variables.get("cache", {})
        if [name[: len(_ROOM)] for name in stored] != [_ROOM]:
            raise ValueError(
                f"decode=True continues the stream of a cache, got {sorted(stored) or 'none'}: "
                "give variables['cache'] from init, with an input of the full length, or init_cache"
            )
        ((name, arrays),) = stored.items()
        room = name.removeprefix(_ROOM)
        length = None if room == "None" else int(room)
        options = self._arguments(self.cache_options)
        build = _cache_builder(self._builder(features), batch_size, length, options)
        return name, cache_from_dict(arrays, _shapes_of(build))


# Cached, because JAX remembers the shapes of what a function returns.


@functools.lru_cache(maxsize=256)
def _layer_builder(nnx_class: Any, features: int, arguments: Arguments) -> Build:
    def build(key: Array) -> tuple[Any, Any]:
        return nnx.split(nnx_class(features, **dict(arguments), rngs=nnx.Rngs(key)), nnx.Param)

    return build


@functools.lru_cache(maxsize=256)
def _cache_builder(
    build: Build, batch_size: int, max_length: int | None, options: Arguments
) -> Callable[[Array], MixerCache]:
    def build_cache(key: Array) -> MixerCache:
        return nnx.merge(*build(key)).init_cache(batch_size, max_length, **dict(options))

    return build_cache


def _shapes_of(build: Callable[[Array], Any]) -> Any:
    return jax.eval_shape(build, jax.eval_shape(jax.random.key, 0))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
