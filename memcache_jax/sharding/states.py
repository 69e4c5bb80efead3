"""Where the parameters, the optimizer's state and the batches of a training run live."""

from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memcache_jax._checks import check_instance
from memcache_jax.sharding.layout import as_axes, as_spec, dividing
from memcache_jax.sharding.names import mesh_axes

if TYPE_CHECKING:
    import optax


def param_shardings(state: nnx.State, mesh: Mesh) -> Any:
    """Returns a ``NamedSharding`` for each parameter, from the names of its axes.

    An axis that its devices do not divide evenly is not divided.

    Args:
      state: parameters or their shapes, as ``nnx.split`` returns them.
      mesh: as from ``make_mesh``; or any other, for which the logical rules in context hold.
    """
    check_instance("state", state, nnx.State, "an nnx.State, as nnx.split returns it")
    _check_mesh(mesh)
    # A mesh in context tells the parameters' names apart from those of other meshes.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        layouts = nnx.to_pure_dict(nnx.get_partition_spec(state))

    def sharding(layout: PartitionSpec, x: Any) -> NamedSharding:
        axes = [as_axes(entry) for entry in layout]
        return NamedSharding(mesh, as_spec(dividing(axes, x, mesh)))

    return jax.tree.map(
        sharding,
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

    _check_mesh(mesh)
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch of rows (b, ...)."""
    _check_mesh(mesh)
    return NamedSharding(mesh, as_spec([mesh_axes("batch", mesh.abstract_mesh)]))


def _check_mesh(mesh: Any) -> None:
    check_instance("mesh", mesh, Mesh, "a jax.sharding.Mesh, as from make_mesh")
