"""Options of a cache: what is refused, and when one state is enough."""

import jax
import jax.numpy as jnp
import pytest

import memcache_jax as mc
from tests.cases import MEMORIES, assert_close, make_inputs
from tests.streams import empty, streamed, whole

LENGTH = 37


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("message", "options"),
    {
        "max_segments must be at least 0, got -1": dict(max_segments=-1),
        "policy='merge' is for segments of one size": dict(
            segmentation=mc.Logarithmic(8), policy="merge", max_segments=4
        ),
        "policy='merge' needs max_segments": dict(policy="merge"),
        "policy must be one of": dict(policy="forget"),
        "placement='host' is for SSC": dict(placement="host", max_segments=2),
        "placement must be one of": dict(placement="disk", max_segments=2),
        "^dtype must be one of": dict(dtype=jnp.bfloat16, max_segments=2),
        "cache_dtype must be one of": dict(cache_dtype="int4", max_segments=2),
        "max_length must be at least 1": dict(max_length=0),
        "give max_segments or max_length, got neither": {},
    }.items(),
)
def test_caches_that_are_none(message, options):
    options = dict(aggregation=mc.GRM(), segmentation=mc.Constant(8)) | options
    with pytest.raises(ValueError, match=message):
        mc.init_cache(1, 2, 4, 4, memory=mc.memories.LinearAttention(), **options)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("titans", mc.Soup(gate="uniform")), ("linear", mc.Residual())],
    ids=["soup", "residual"],
)
def test_a_running_mean_is_all_that_uniform_gates_need(name, kind):
    memory = MEMORIES[name]
    inputs = jax.tree.map(jnp.asarray, make_inputs(memory, LENGTH))
    assert empty(inputs, memory, kind, mc.Constant(4)).pooled.shape[2] == 1
    got, wanted = (run(inputs, memory, kind, mc.Constant(4)) for run in (streamed, whole))
    assert_close(got, wanted, 1e-10)
