"""One call's tokens cut into chunks."""

from typing import Any

import memcache_jax as mc
from tests.cases import MEMORIES, make_inputs, run


def test_memory_does_not_grow_with_the_square_of_an_odd_length():
    memory = MEMORIES["linear"]

    def temporaries(length):
        inputs = make_inputs(memory, length)
        compiled = run.lower(inputs, memory, mc.GRM(), size=4096).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporaries(1021) < 1.5 * temporaries(1024)
