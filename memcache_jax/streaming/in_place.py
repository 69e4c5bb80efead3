"""Updates that few tokens make, without copying the arrays for the tokens that make none.

XLA copies what ``lax.cond`` passes on unchanged, but not what a loop of no iterations passes on.
Loops have no reverse mode, so derivatives are those of a select. A GPU stalls at each loop for
longer than it takes to write the arrays, so a select is used there too. Barriers keep XLA from
hoisting the work of the first iteration out of the loop.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from memcache_jax._typing import Array, Bool
from memcache_jax.sharding.layout import auto_axes, explicit_axes
from memcache_jax.streaming.loops import Slim, once_if, while_loop

T = TypeVar("T")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def change_if(
    change: Callable[..., T], condition: Bool[Array, ""], arrays: T, args: tuple = ()
) -> T:
    """``change(arrays, *args)``, which must equal ``arrays`` where the condition is false.

    ``change`` must not close over traced arrays.
    """

    def in_loop(condition: Array, arrays: T, args: tuple) -> T:
        return once_if(
            condition, lambda arrays, its: change(arrays, *its.full()), arrays, Slim.of(args)
        )

    always = functools.partial(_always, change)
    return _by_platform(always, in_loop, condition, arrays, args)


@change_if.defjvp
def _(change: Callable[..., T], primals: tuple, tangents: tuple) -> tuple[T, T]:
    return jax.jvp(functools.partial(_always, change), primals, tangents)


def _always(change: Callable[..., T], condition: Array, arrays: T, args: tuple = ()) -> T:
    del condition
    return change(arrays, *args)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def change_rows(
    change: Callable[..., T],
    rows: Bool[Array, "b"],
    arrays: T,
    args: tuple = (),
    common: tuple = (),
) -> T:
    """Applies ``change(arrays, *args, *common)`` to each marked row of arrays and args (b, ...).

    Rows change one after the other, or, where a mesh may divide them, all in one select. ``change``
    must not close over traced arrays.
    """
    in_loop = functools.partial(_one_by_one if _on_one_device() else _all_if_any, change)
    selected = functools.partial(_selected_rows, change)
    return _by_platform(selected, in_loop, rows, arrays, args, common)


def _on_one_device() -> bool:
    """Whether arrays are known to lie on one device: indexing a row of others would gather them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return not auto_axes(mesh) and not explicit_axes(mesh)


def _one_by_one(change: Callable[..., T], rows: Array, arrays: T, args: tuple, common: tuple) -> T:
    slim = Slim.of((args, common))

    def of_row(carry: tuple[Array, T]) -> tuple[Array, T]:
        left, arrays = carry
        row, (args, common) = jnp.argmax(left), slim.full()
        own, its = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, row, keepdims=False), (arrays, args)
        )
        # This loop reads all that the writes below overwrite before they begin; with a plain call
        # XLA copies the arrays.
        new = once_if(left.any(), lambda own, its: change(own, *its), own, (*its, *common))
        arrays = jax.tree.map(
            lambda x, new: lax.dynamic_update_index_in_dim(x, new, row, 0), arrays, new
        )
        return left.at[row].set(False), arrays

    return while_loop(lambda carry: carry[0].any(), of_row, (rows, arrays))[1]


def _all_if_any(change: Callable[..., T], rows: Array, arrays: T, args: tuple, common: tuple) -> T:
    def of_all(i: Array, arrays: T) -> T:
        _, its, alike = lax.optimization_barrier((i, args, common))
        return _selected_rows(change, rows, arrays, its, alike)

    return lax.fori_loop(0, rows.any().astype(jnp.int32), of_all, arrays)


@change_rows.defjvp
def _(change: Callable[..., T], primals: tuple, tangents: tuple) -> tuple[T, T]:
    return jax.jvp(functools.partial(_selected_rows, change), primals, tangents)


def _selected_rows(
    change: Callable[..., T], rows: Array, arrays: T, args: tuple = (), common: tuple = ()
) -> T:
    new = jax.vmap(lambda arrays, args: change(arrays, *args, *common))(arrays, args)
    return jax.tree.map(
        lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, arrays
    )


def _by_platform(selected: Callable[..., T], in_loop: Callable[..., T], *args: Any) -> T:
    return lax.platform_dependent(*args, cuda=selected, rocm=selected, default=in_loop)
