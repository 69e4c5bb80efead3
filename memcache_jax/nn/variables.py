"""Variables of Linen from the parameters and the cache of an NNX layer, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util

from memcache_jax import _checks
from memcache_jax.streaming.protocol import MixerCache


def axis_names(parameter: nnx.Variable) -> tuple[Any, ...] | None:
    """The names of a parameter's axes; None if it has none."""
    return parameter.get_metadata().get("out_sharding")


def values(state: nnx.State) -> dict[str, Any]:
    """The parameters of a state, or their shapes, as nested dictionaries."""
    return _nested(state, lambda parameter: parameter.get_value())


def boxed_values(state: nnx.State) -> dict[str, Any]:
    """Those whose axes have names are boxed with them, as ``nn.with_logical_partitioning`` does."""

    def box(parameter: nnx.Variable) -> Any:
        names, value = axis_names(parameter), parameter.get_value()
        return value if names is None else linen.LogicallyPartitioned(value, names)

    return _nested(state, box)


def with_values(state: nnx.State, params: Mapping[str, Any]) -> nnx.State:
    """The state with the parameters of nested dictionaries.

    Raises:
      ValueError: if their names are not those of the state's.
    """
    given = _flat(params)
    wanted = {_name(path): (path, parameter) for path, parameter in nnx.to_flat_state(state)}
    _checks.check_names("the layer's parameters", given, wanted)
    return nnx.from_flat_state(
        [
            (path, parameter.replace(jnp.asarray(given[name])))
            for name, (path, parameter) in wanted.items()
        ]
    )


def cache_to_dict(cache: MixerCache) -> dict[str, Any]:
    """A cache as nested dictionaries of arrays with rows: those without are the parameters'."""
    return traverse_util.unflatten_dict(_by_name(_without_common(cache)), sep="/")


def cache_from_dict(arrays: Mapping[str, Any], like: MixerCache) -> MixerCache:
    """The cache of these arrays, in the structure and with the shapes of another one.

    Raises:
      ValueError: if their names, shapes or dtypes differ.
    """
    given = _flat(arrays)
    wanted = _by_name(_without_common(like))
    _checks.check_names("the cache's arrays", given, wanted)
    for name, x in wanted.items():
        got = jnp.shape(given[name]), jnp.result_type(given[name])
        if got != (x.shape, x.dtype):
            raise ValueError(
                f"the cache's {name} is {got[1]} {got[0]}, but this layer and its input need "
                f"{x.dtype} {x.shape}"
            )
    leaves = [
        jnp.asarray(given[name]) if name in given else jnp.zeros(x.shape, x.dtype)
        for name, x in _by_name(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _nested(state: nnx.State, of: Callable[[nnx.Variable], Any]) -> dict[str, Any]:
    flat = {_name(path): of(parameter) for path, parameter in nnx.to_flat_state(state)}
    return traverse_util.unflatten_dict(flat, sep="/")


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(nested, sep="/"))


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _by_name(cache: MixerCache) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _without_common(cache: MixerCache) -> MixerCache:
    nested = {name: _without_common(getattr(cache, name)) for name in cache.nested}
    return cache.replace(**dict.fromkeys(cache.common), **nested)
