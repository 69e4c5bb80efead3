"""What a token does not read reaches neither its output nor a gradient, NaN or infinity though."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax.engine.gates import gates_of_tokens
from tests.cases import (
    KINDS,
    MEMORIES,
    REFERENCE,
    SEGMENTATIONS,
    assert_close,
    combine,
    make_inputs,
    run_all,
)
from tests.covers import kept_of

pytestmark = pytest.mark.slow

LENGTH, SIZE, BORDER = 21, 4, 12
CONSTANT, LOGARITHMIC = ((name, "independent") for name in SEGMENTATIONS)
CASES = {
    "swla": combine(["grm", "ssc"], [CONSTANT]),
    "linear": combine(["grm", "ssc"], [CONSTANT]) + combine(["ssc"], [LOGARITHMIC]),
    "titans": combine(["grm", "ssc_soup"], [CONSTANT]) + combine(["soup"], [LOGARITHMIC]),
    "vector": combine(["ssc"], [CONSTANT]) + combine(["grm"], [LOGARITHMIC]),
}
FEW = combine(["grm", "ssc"], [CONSTANT])
# A document that ends on a segment's border, and one of which segments are cached and read.
IDS = (np.arange(LENGTH) >= BORDER).astype(np.int32)[None]
PATHS = {name: (name, ()) for name in ("linear", "swla", "titans", "vector")}
PATHS |= {"reference": ("linear", REFERENCE)}


@functools.partial(jax.jit, static_argnames=("memory", "cases", "options"))
def outputs_and_gradients(inputs, masks, ids, memory, cases, options):
    """The outputs of all cases, and the gradients of those that a mask has."""
    results = {}
    for case in cases:

        def output(inputs, case=case):
            one = run_all(
                inputs, memory, size=SIZE, cases=(case,), options=options, document_ids=ids
            )
            return one["/".join(case)]

        y, pull = jax.vjp(output, inputs)
        cotangent = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        results[case] = y, pull(jnp.where(masks[case][..., None], cotangent, 0))[0]
    return results


def compare_where(masks, inputs, changes, name, options, ids=None):
    """Compares the tokens of a mask (b, t, h) with and without other numbers in one token.

    Args:
      masks: by case.
      inputs: of ``memory_caching``.
      changes: the token, and what its arguments become.
      name: of the memory.
      options: of ``run_all``.
      ids: of documents.
    """
    run = functools.partial(
        outputs_and_gradients, memory=MEMORIES[name], cases=tuple(masks), options=options
    )
    token, values = changes
    broken = {argument: x.copy() if argument in values else x for argument, x in inputs.items()}
    for argument, value in values.items():
        broken[argument][:, token] = value
    wanted = run(inputs, masks, ids)
    for case, (y, gradients) in run(broken, masks, ids).items():
        mask, (y_wanted, gradients_wanted) = masks[case], wanted[case]
        assert not np.isfinite(y[~mask]).all()
        assert_close({case: y[mask]}, {case: y_wanted[mask]}, 1e-12)
        for argument in ("query", "connector"):
            got, clean = (x[argument][mask] for x in (gradients, gradients_wanted))
            assert_close({(case, argument): got}, {(case, argument): clean}, 1e-12)


def tokens_blind_to(segment, inputs, case):
    """Which tokens (b, t, h) have a gate of zero for all states of a segment, and are not in it."""
    kind, name, _ = case
    segmentation = SEGMENTATIONS[name](SIZE)
    gates = gates_of_tokens(
        jnp.asarray(inputs["key"]),
        jnp.asarray(inputs["connector"]),
        aggregation=KINDS[kind],
        segmentation=segmentation,
    )
    first, after = segmentation.plan(LENGTH).buckets.T
    holds = (first <= segment) & (segment < after)
    reads = (np.asarray(gates)[..., :-1][..., holds] != 0).any(axis=-1)
    inside = np.arange(LENGTH) // SIZE == segment
    return ~(reads | inside[None, :, None])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("path", kept_of(PATHS, "titans", "reference"))
def test_a_state_that_a_token_does_not_read(path):
    name, options = path
    inputs = make_inputs(MEMORIES[name], LENGTH, batch=1, heads=2)
    cases = FEW if options else CASES[name]
    masks = {case: tokens_blind_to(2, inputs, case) for case in cases}
    assert all(mask[:, :8].all() for mask in masks.values())
    assert any(mask[:, 12:].any() for mask in masks.values())  # SSC's
    # The last token's of a segment: a vector has no other.
    compare_where(masks, inputs, (11, dict(value=np.nan)), name, options)
    earlier = dict.fromkeys(masks, np.zeros((1, LENGTH, 2), bool))
    for mask in earlier.values():
        mask[:, :8] = True
    compare_where(earlier, inputs, (11, dict(key=np.inf, value=-np.inf)), name, options)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("path", kept_of(PATHS, "swla", "vector"))
def test_another_document(path):
    name, options = path
    inputs = make_inputs(MEMORIES[name], LENGTH, batch=1, heads=2)
    cases = FEW if options else combine(["grm", "soup"], [CONSTANT])
    if name == "linear" and not options:
        cases += combine(["grm", "ssc"], [LOGARITHMIC])
    masks = dict.fromkeys(cases, np.broadcast_to(IDS[..., None] == 1, (1, LENGTH, 2)))
    changes = BORDER - 1, dict(key=np.inf, value=np.nan)
    compare_where(masks, inputs, changes, name, options, IDS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ids", kept_of({"one document": None, "documents": IDS}, "documents"))
def test_a_state_that_a_router_selects_with_a_gate_of_zero(ids):
    inputs = make_inputs(MEMORIES["linear"], LENGTH, batch=1, heads=1)
    far = np.array([0.0, 0.0, -1e5, -1e5, -1e5])
    inputs["connector"] = np.broadcast_to(far, (1, LENGTH, 1, 5)).copy()

    @jax.jit
    def outputs(inputs):
        return mc.memory_caching(
            **inputs,
            memory=MEMORIES["linear"],
            aggregation=mc.SSC(gate="position", top_k=3),
            segmentation=mc.Constant(SIZE),
            document_ids=None if ids is None else jnp.asarray(ids),
        )

    wanted = np.asarray(outputs(inputs))
    inputs["value"][0, 1] = np.nan
    reads = np.arange(LENGTH) < 2 * SIZE  # the first segment, and the one after it
    got = np.asarray(outputs(inputs))
    assert np.isnan(got[:, reads][:, 1:]).all()
    assert_close(got[:, ~reads], wanted[:, ~reads], 1e-12)
