"""Parameters saved under earlier names."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

_EARLIER, _NOW = "gate", "output_gate"


def upgrade_params(tree: Any) -> Any:
    """Renames parameters saved by an earlier version: ``gate`` of a layer to ``output_gate``.

    A tree that has the current names is returned with the same names.

    Args:
      tree: parameters of any model with ``MemoryCaching`` layers, as an ``nnx.State`` or nested
        dictionaries, or a tree that contains such, like an optimizer's state.

    Example:
      >>> import memcache_jax as mc
      >>> params = {"mixer": {"query_conv": {}, "gate": {"kernel": 1.0}}, "mlp": {"gate": 2.0}}
      >>> mc.nn.upgrade_params(params)
      {'mixer': {'query_conv': {}, 'output_gate': {'kernel': 1.0}}, 'mlp': {'gate': 2.0}}
    """
    return _rename(tree, _EARLIER, _NOW)


def with_saved_names(target: Any, saved: Any) -> Any:
    """Renames the target of a load to match the names under which parameters were saved.

    Args:
      target: shapes of parameters, or a tree that contains such, under the current names.
      saved: a tree with the structure of the saved parameters.
    """
    same = jax.tree.structure(saved) == jax.tree.structure(upgrade_params(saved))
    return target if same else _rename(target, _NOW, _EARLIER)


def _rename(tree: Any, old: str, new: str) -> Any:
    def of_mapping(tree: Any) -> Any:
        if isinstance(tree, nnx.State):
            return nnx.State(of_mapping(tree.raw_mapping))
        if not isinstance(tree, Mapping):
            return tree
        # Not the gate of SwiGLU, which has no convolutions.
        names = {old: new} if "query_conv" in tree else {}
        items = {names.get(name, name): _rename(x, old, new) for name, x in tree.items()}
        return type(tree)(items)  # pyright: ignore[reportCallIssue]

    return jax.tree.map(of_mapping, tree, is_leaf=lambda x: isinstance(x, Mapping))
