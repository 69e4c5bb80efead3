"""What a compiled program needs, of XLA's figures."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from experiments._memory import memory_of


@pytest.mark.parametrize(("of_xla", "peak"), [(100, 115), (130, 130)])
def test_the_peak_has_all_that_is_allocated_and_all_that_is_alive(of_xla, peak):
    analysis = SimpleNamespace(
        argument_size_in_bytes=80,
        output_size_in_bytes=65,
        alias_size_in_bytes=60,
        temp_size_in_bytes=30,
        peak_memory_in_bytes=of_xla,
    )
    compiled = SimpleNamespace(memory_analysis=lambda: analysis)
    assert memory_of(compiled) == dict(argument_bytes=80, temporary_bytes=30, peak_bytes=peak)


def test_a_donated_argument_counts_once():
    def peak(**options):
        add = jax.jit(lambda x: x + 1, **options)
        return memory_of(add.lower(jnp.zeros(1000)).compile())["peak_bytes"]

    assert (peak(), peak(donate_argnums=0)) == (8000, 4000)
