"""Parameters that were saved under earlier names."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

_EARLIER, _NOW = "gate", "output_gate"


def upgrade_params(tree: Any) -> Any:
    """Renames the parameters of an earlier version: the output ``gate`` is now ``output_gate``.

    Trees with today's names come back as they are.

    Args:
      tree: parameters of any module with ``MemoryCaching`` layers, an ``nnx.State`` or nested
        dictionaries, or a tree of such, like the state of an optimizer.

    Example:
      >>> import memcache_jax as mc
      >>> params = {"mixer": {"query_conv": {}, "gate": {"kernel": 1.0}}, "mlp": {"gate": 2.0}}
      >>> mc.nn.upgrade_params(params)
      {'mixer': {'query_conv': {}, 'output_gate': {'kernel': 1.0}}, 'mlp': {'gate': 2.0}}
    """
    return _rename(tree, _EARLIER, _NOW)


def with_saved_names(target: Any, saved: Any) -> Any:
    """Renames what is to be loaded as the parameters were when they were saved.

    Args:
      target: shapes of parameters, and of what else has their names, under today's names.
      saved: a tree of the saved parameters' form.
    """
    same = jax.tree.structure(saved) == jax.tree.structure(upgrade_params(saved))
    return target if same else _rename(target, _NOW, _EARLIER)


def _rename(tree: Any, old: str, new: str) -> Any:
    def of_mapping(tree: Any) -> Any:
        if isinstance(tree, nnx.State):
            return nnx.State(of_mapping(tree.raw_mapping))
        if not isinstance(tree, Mapping):
            return tree
        # SwiGLU has a gate too, which keeps its name.
        names = {old: new} if "query_conv" in tree else {}
        items = {names.get(name, name): _rename(x, old, new) for name, x in tree.items()}
        return type(tree)(items)  # pyright: ignore[reportCallIssue]

    return jax.tree.map(of_mapping, tree, is_leaf=lambda x: isinstance(x, Mapping))
