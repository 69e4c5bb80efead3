"""Where the parameters, the optimizer's state and the batches of a training run live."""

from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memcache_jax.sharding.mesh import RULES, fit, spec

if TYPE_CHECKING:
    import optax


def param_shardings(state: nnx.State, mesh: Mesh) -> Any:
    """Returns a ``NamedSharding`` for each parameter, from the names of its axes.

    An axis that its devices do not divide evenly is not divided.

    Args:
      state: parameters or their shapes, as ``nnx.split`` returns them.
      mesh: as from ``make_mesh``.
    """
    with nnx.logical_axis_rules(tuple(RULES.items())):
        layouts = nnx.to_pure_dict(nnx.get_partition_spec(state))
    return jax.tree.map(
        lambda layout, x: NamedSharding(mesh, fit(layout, x, mesh)),
        layouts,
        nnx.to_pure_dict(state),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def state_shardings(
    optimizer: "optax.GradientTransformation", params: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Returns the shardings of an optimizer's state: those of the parameters where it has one each.

    Args:
      optimizer: the optimizer.
      params: the parameters, or their shapes.
      shardings: those of the parameters.
      mesh: as from ``make_mesh``.
    """
    import optax  # from the extra `train`

    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch of rows (b, ...)."""
    return NamedSharding(mesh, spec("batch"))
