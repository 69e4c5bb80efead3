"""Block sizes are those measured on the kind of device that is named, or the default."""

import dataclasses

import jax
import jax.numpy as jnp

from memcache_jax.kernels import _table
from memcache_jax.kernels._block_sizes import block_sizes, row_key, tuned_for


@dataclasses.dataclass(frozen=True)
class Sizes:
    rows: int


def test_measured_or_default(monkeypatch):
    rows = {"default": {"rows": 1}, row_key("TPU v5 lite", "n3 c8 4x4", jnp.float32): {"rows": 2}}
    monkeypatch.setitem(_table.TABLE, "op/pallas_tpu", rows)

    def look(shape, dtype=jnp.float32):
        return block_sizes(Sizes, "op/pallas_tpu", shape, dtype).rows

    assert look("n3 c8 4x4") == 1
    with tuned_for("TPU v5 lite"):
        assert [look("n3 c8 4x4"), look("n3 c8 4x5"), look("n3 c8 4x4", jnp.bfloat16)] == [2, 1, 1]
    with tuned_for("TPU v6 lite"):
        assert look("n3 c8 4x4") == 1
    monkeypatch.setitem(rows, row_key("cpu", "n3 c8 4x4", jnp.float32), {"rows": 3})
    with jax.default_device(jax.devices()[0]):
        assert look("n3 c8 4x4") == 3
    assert look("n3 c8 4x4") == 1  # a device that is merely there is not asked
