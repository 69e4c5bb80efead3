"""One call's tokens cut into chunks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import memcache_jax as mc
from memcache_jax.kernels._dispatch import interpret_kernels
from tests.cases import MEMORIES, assert_close, make_inputs, run


def test_memory_does_not_grow_with_the_square_of_an_odd_length():
    memory = MEMORIES["linear"]

    def temporaries(length):
        inputs = make_inputs(memory, length)
        compiled = run.lower(inputs, memory, mc.GRM(), size=4096).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporaries(1021) < 1.5 * temporaries(1024)


@dataclasses.dataclass(frozen=True)
class Sharper(mc.GRM):
    """GRM of connectors twice as long."""

    def select(self, connector, candidates, **options):
        return super().select(2 * connector, candidates, **options)


def test_tpu_kernels_take_connectors_that_an_aggregation_changed():
    memory = MEMORIES["gla"]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 22, heads=2, dtype=np.float32))
    how: Any = dict(memory=memory, aggregation=Sharper(), segmentation=mc.Constant(8))
    with interpret_kernels():
        got = mc.memory_caching(**inputs, **how, implementation="pallas_tpu")
    assert_close(got, mc.memory_caching(**inputs, **how), 1e-6)
