"""Deep memories written by the kernel that carries them through all chunks of a block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.kernels._dispatch import interpret_kernels
from tests.cases import MEMORIES, assert_close, make_inputs, value_and_vjp
from tests.covers import exhaustive_unless

IDS = np.array([[0] * 5 + [1] * 3 + [2] * 8, [0] * 8 + [1] * 1 + [2] * 2 + [3] * 5])
LAYERS = {
    "titans GRM": ("titans", mc.GRM(), mc.Constant(8), "checkpoint", None),
    "dla GRM": ("dla", mc.GRM(), mc.Constant(4), "independent", None),
    "titans soup": ("titans", mc.Soup(), mc.Logarithmic(4), "independent", None),
    "titans SSC, documents": ("titans", mc.SSC(top_k=1), mc.Constant(8), "checkpoint", IDS),
    "titans depth 1, some begin anew": (
        *("titans_depth1", mc.Residual(), mc.Lengths((4, 8, 4)), "independent", None),
    ),
}


@pytest.mark.parametrize(
    ("name", "aggregation", "segmentation", "start", "ids"),
    [
        pytest.param(
            *case,
            id=name,
            marks=() if case[0] == "titans_depth1" else exhaustive_unless(name != "titans GRM"),
        )
        for name, case in LAYERS.items()
    ],
)
def test_memory_caching(name, aggregation, segmentation, start, ids):
    memory = MEMORIES[name]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, 16, heads=1, dtype=np.float32))
    if not aggregation.needs_connector:
        del inputs["connector"]

    def outputs(implementation):
        def run(inputs):
            return mc.memory_caching(
                **inputs,
                memory=memory,
                aggregation=aggregation,
                segmentation=segmentation,
                start=start,
                document_ids=None if ids is None else jnp.asarray(ids),
                implementation=implementation,
            )

        return value_and_vjp(run, inputs)

    with interpret_kernels():
        got = outputs("pallas_gpu")
    wanted = outputs("xla")
    assert_close(got[0], wanted[0], 1e-6)
    assert_close(got[1], wanted[1], 2e-6)


@dataclasses.dataclass(frozen=True)
class Cubed(mc.memories.Titans):
    """Another loss."""

    form = "descent"

    def loss(self, prediction, value):
        return jnp.sum(jnp.abs(prediction - value) ** 3)


@dataclasses.dataclass(frozen=True)
class Doubled(mc.memories.Titans):
    """Another network."""

    def forward(self, apply, query, gate=None):
        return 2 * super().forward(apply, query, gate)


def layer(memory, dim, implementation, **sizes):
    inputs = make_inputs(memory, 32, batch=1, heads=1, dim=dim, dtype=np.float32, **sizes)
    inputs = jax.tree.map(jnp.asarray, inputs)
    return mc.memory_caching(
        **inputs,
        memory=memory,
        aggregation=mc.Residual(),
        segmentation=mc.Constant(32),
        implementation=implementation,
    )


@pytest.mark.slow
def test_another_loss():
    memory = Cubed(chunk_size=16, expansion=1)
    with interpret_kernels():
        got = layer(memory, 16, "pallas_gpu")
    assert_close(got, layer(memory, 16, "xla"), 1e-6)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (Cubed(chunk_size=8), "the loss of Cubed .* powers of two"),
        (Cubed(chunk_size=16, depth=1), r"the loss of Cubed .* \(16, 16, 24\)"),
        (Doubled(chunk_size=16), "neither deep nor an affine map"),
    ],
    ids=["loss of rows filled up", "loss of values filled up", "network"],
)
def test_other_rules_are_refused(memory, message):
    with interpret_kernels(), pytest.raises(NotImplementedError, match=message):
        layer(memory, 16, "pallas_gpu", value_dim=24 if memory.depth == 1 else None)
