"""FLOPs counted from a traced program, against sums by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments._flops import count_flops

A, B = jnp.ones((3, 4)), jnp.ones((4, 5))


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda: A @ B, 2 * 3 * 4 * 5),
        (lambda: jnp.sin(A).sum(), 0),
        (lambda: jnp.einsum("bij,bkj->bik", jnp.ones((7, 3, 4)), jnp.ones((7, 5, 4))), 7 * 120),
        (lambda: lax.scan(lambda c, _: (c + A @ B, None), jnp.zeros((3, 5)), None, 6), 6 * 120),
        (lambda: jax.jit(lambda: A @ B)(), 120),
        (lambda: lax.cond(A[0, 0] > 0, lambda: A @ B, lambda: A @ A.T @ A @ B), 72 + 72 + 120),
        (lambda: jax.grad(lambda a: jnp.sum((a @ B) ** 2))(A), 2 * 120),
        (lambda: jax.vmap(lambda a: a @ B)(jnp.ones((2, 3, 4))), 2 * 120),
    ],
    ids=["matmul", "elementwise", "batched", "scan", "jit", "cond", "gradient", "vmap"],
)
def test_counts(function, wanted):
    assert count_flops(function) == wanted


def test_loops_of_unknown_rounds_count_one():
    def power(x):
        return lax.while_loop(lambda y: y.sum() < 3, lambda y: y @ x, x)

    assert count_flops(power, jnp.ones((2, 2))) == 2 * 2**3
