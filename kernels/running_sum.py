"""Running sums in two levels, with a derivative by hand for a CPU's sake."""

import jax
import jax.numpy as jnp

from memcache_jax._typing import Array, Float, Int


def running_sum(x: Float[Array, "n c k"], width: int = 16) -> Float[Array, "n c k"]:
    """Cumulative sum over c, ``width`` rows at a time: ``jnp.cumsum`` of all of c is slow on CPUs.

    Args:
      x: the rows.
      width: rows that one matrix product sums.
    """
    n, c, k = x.shape
    rows = _in_groups(x, width)
    ones = jnp.broadcast_to(jnp.tri(width, dtype=x.dtype), (*rows.shape[:2], width, width))
    inner = _sums_of_rows(ones, rows)
    before = jnp.cumsum(inner[:, :, -1], axis=1) - inner[:, :, -1]
    return (inner + before[:, :, None]).reshape(n, -1, k)[:, :c]


def running_products(
    x: Float[Array, "n c k"], y: Float[Array, "n c k"], width: int = 16
) -> Float[Array, "n c"]:
    """``jnp.vecdot(x, running_sum(y))``, without storing the running sums.

    Args:
      x: the rows that are multiplied.
      y: the rows that are summed.
      width: rows whose products with each other are computed at once.
    """
    n, c, _ = x.shape
    x, y = _in_groups(x, width), _in_groups(y, width)
    pairs = jnp.einsum("nwik,nwjk->nwij", x, y, precision="highest")
    inner = jnp.where(jnp.tri(width, dtype=bool), pairs, 0).sum(axis=-1)
    sums = y.sum(axis=2)
    before = jnp.cumsum(sums, axis=1) - sums
    outer = jnp.einsum("nwik,nwk->nwi", x, before, precision="highest")
    return (inner + outer).reshape(n, -1)[:, :c]


def running_document_sum(
    x: Float[Array, "n c k"], document: Int[Array, "n c"], width: int = 16
) -> Float[Array, "n c k"]:
    """``running_sum`` that begins anew with each document.

    An associative scan that does so has log2(c) levels, all of which its gradient keeps.

    Args:
      x: the rows.
      document: a number for each row, which never falls along c.
      width: rows that one matrix product sums.
    """
    n, c, k = x.shape
    number = jnp.pad(document, ((0, 0), (0, -c % width)), mode="edge").reshape(n, -1, width)
    ones = jnp.tri(width, dtype=bool)[None, None] & (number[..., None] == number[:, :, None])
    inner = _sums_of_rows(ones.astype(x.dtype), _in_groups(x, width))
    last = number[:, :, -1]
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))  # the document that may go on into a group
    ones = jnp.tri(last.shape[1], k=-1, dtype=bool)[None] & (before[..., None] == last[:, None])
    earlier = _sums_of_rows(ones[:, None].astype(x.dtype), inner[:, None, :, -1])[:, 0]
    goes_on = (number == before[..., None])[..., None]
    return (inner + jnp.where(goes_on, earlier[:, :, None], 0)).reshape(n, -1, k)[:, :c]


def _in_groups(x: Float[Array, "n c k"], width: int) -> Float[Array, "n w i k"]:
    n, c, k = x.shape
    return jnp.pad(x, ((0, 0), (0, -c % width), (0, 0))).reshape(n, -1, width, k)


def _products(constants: Float[Array, "n w i j"], x: Float[Array, "n w j k"]) -> Array:
    return jnp.einsum("nwij,nwjk->nwik", constants, x, precision="highest")


@jax.custom_vjp
def _sums_of_rows(constants: Float[Array, "n w i j"], x: Float[Array, "n w j k"]) -> Array:
    """Products with constants, which come first backward too.

    With x first, or one constant for all, XLA's CPU backend transposes x, which takes longer.
    """
    return _products(constants, x)


_sums_of_rows.defvjp(
    lambda constants, x: (_products(constants, x), constants),
    lambda constants, d_y: (None, _products(jnp.matrix_transpose(constants), d_y)),
)
