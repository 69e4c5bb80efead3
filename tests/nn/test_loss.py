"""The loss without logits: the plain one's values and gradients, on meshes too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import memcache_jax as mc
from memcache_jax.nn import in_pieces
from tests.covers import kept_of, product

ROWS, LENGTH, FEATURES, VOCAB = 2, 12, 8, 24


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Four tokens at a time, so that the last piece is filled up where there are 22."""
    monkeypatch.setattr(in_pieces, "LOGITS", 4 * VOCAB)


def arrays(dtype, length=LENGTH):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((ROWS, length, FEATURES)), dtype)
    matrix = jnp.asarray(rng.standard_normal((FEATURES, VOCAB)), dtype)
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, length)))
    return hidden, matrix, targets, jnp.asarray(rng.random((ROWS, length)), dtype)


def ours(hidden, matrix, weights, targets, *, z_loss=0.1, scale=0.7):
    options = dict(z_loss=z_loss, scale=scale)
    return 3 * mc.nn.cross_entropy(hidden, matrix, targets, weights, **options).total


def plain(hidden, matrix, weights, targets, *, z_loss=0.1, scale=0.7):
    logits = scale * (hidden @ matrix)
    partition = jax.nn.logsumexp(logits, axis=-1)
    loss = partition - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if z_loss:
        loss += z_loss * partition**2
    return 3 * jnp.sum(weights * loss)


@functools.cache
def gradients(loss, **options):
    return jax.jit(jax.value_and_grad(functools.partial(loss, **options), (0, 1, 2)))


def check(got, wanted, tolerance):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        size = np.abs(np.asarray(other)).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-6)])
def test_it_is_the_plain_loss(dtype, tolerance, x64):
    hidden, matrix, targets, weights = arrays(dtype, length=11)
    got = gradients(ours)(hidden, matrix, weights, targets)
    check(got, gradients(plain)(hidden, matrix, weights, targets), tolerance)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}


@pytest.mark.slow
def test_products_of_bfloat16_are_summed_in_float32():
    hidden, matrix, targets, weights = arrays("float32")
    hidden, rounded = hidden.astype(jnp.bfloat16), matrix.astype(jnp.bfloat16)
    loss, (d_hidden, d_matrix, _) = gradients(ours)(hidden, matrix, weights, targets)
    wide = hidden.astype(jnp.float32), rounded.astype(jnp.float32), weights, targets
    wanted, (wide_hidden, wide_matrix, _) = gradients(plain)(*wide)
    check((loss, d_matrix), (wanted, wide_matrix), 4e-3)
    check(loss, wanted, 1e-6)
    check(d_hidden.astype(jnp.float32), wide_hidden, 1e-2)
    assert (loss.dtype, d_hidden.dtype, d_matrix.dtype) == ("float32", "bfloat16", "float32")


def test_small_gradients_of_float16_are_not_lost_before_they_are_scaled():
    hidden, matrix, targets, weights = arrays("float32")

    def scaled(factor, hidden, matrix):
        loss = mc.nn.cross_entropy(hidden, matrix, targets, 1e-9 * weights)
        return factor * loss.total

    gradient = jax.grad(scaled, (1, 2))
    wanted = gradient(1e9, hidden, matrix)
    got = gradient(1e9, *(x.astype("float16") for x in (hidden, matrix)))
    assert {x.dtype.name for x in got} == {"float16"}
    check(got, wanted, 2e-3)


def test_gradients_of_log_probabilities_and_partitions(x64):
    hidden, matrix, targets, weights = arrays("float64", length=11)

    def scores(hidden, matrix):
        found = mc.nn.cross_entropy(hidden, matrix, targets, weights)
        return weights * found.log_probability, weights**2 * found.log_partition

    def plain_scores(hidden, matrix):
        logits = hidden @ matrix
        partition = jax.nn.logsumexp(logits, axis=-1)
        of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return weights * (of_target - partition), weights**2 * partition

    def gradient(of):
        return jax.jit(jax.grad(lambda *x: sum(map(jnp.sum, of(*x))), (0, 1)))(hidden, matrix)

    check(gradient(scores), gradient(plain_scores), 1e-10)


def test_the_gradient_of_the_total_alone_computes_logits_once():
    hidden, matrix, targets, weights = arrays("float32")

    def loss(hidden, among):
        return mc.nn.cross_entropy(hidden, matrix, targets, weights)[among].sum()

    programs = [str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(hidden, i)) for i in (0, 1)]
    assert [program.count("scan[") > 1 for program in programs] == [False, True]


def test_targets_of_weight_zero_do_not_count():
    hidden, matrix, targets, weights = arrays("float32")
    weights = weights.at[:, 5:].set(0)
    got = gradients(ours)(hidden, matrix, weights, targets.at[0, 5].set(-1).at[1, 6].set(VOCAB))
    wanted = gradients(plain)(hidden, matrix, weights, targets)
    check((got[0], got[1][:2]), (wanted[0], wanted[1][:2]), 1e-6)
    assert np.isnan(gradients(ours)(hidden, matrix, weights, targets.at[0, 0].set(-1))[0])
    assert np.isnan(gradients(ours)(hidden, matrix, weights, targets.at[0, 0].set(VOCAB))[0])


@pytest.mark.parametrize(
    ("where", "number"), product(["hidden", "matrix"], [np.nan, np.inf, -np.inf], turn=0)
)
def test_what_is_not_finite_spoils_what_it_spoils_in_the_plain_loss(where, number):
    hidden, matrix, targets, weights = arrays("float32")
    if where == "hidden":
        hidden = hidden.at[0, 3, 2].set(number)
    else:  # a word that is infinitely likely or unlikely
        hidden, matrix = jnp.abs(hidden), matrix.at[:, 5].set(number)
        targets = jnp.where(targets == 5, 6, targets)
    got, wanted = (
        gradients(loss, z_loss=0.0)(hidden, matrix, weights, targets) for loss in (ours, plain)
    )
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(np.isnan, x) for x in (got, wanted)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, wanted)


@pytest.mark.slow
def test_it_never_holds_the_logits():
    hidden, matrix, targets, weights = arrays("float32")
    traced = jax.make_jaxpr(gradients(ours))(hidden, matrix, weights, targets)
    scored = jax.make_jaxpr(jax.grad(score))(hidden, matrix, targets)
    assert max(sizes(traced.jaxpr)) < ROWS * LENGTH * VOCAB
    assert max(sizes(scored.jaxpr)) < ROWS * LENGTH * VOCAB
    reference = jax.make_jaxpr(gradients(plain))(hidden, matrix, weights, targets)
    assert max(sizes(reference.jaxpr)) == ROWS * LENGTH * VOCAB


def sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for part in jaxprs_in_params(equation.params):
            yield from sizes(part)


def score(hidden, matrix, targets):
    return mc.nn.token_scores(hidden, matrix, targets).log_probability.sum()


def test_scores_are_those_of_the_logits():
    hidden, matrix, targets, _ = arrays("float32")
    matrix = matrix.at[:, 7].set(matrix[:, 3])  # ties
    likely = jnp.argmax(hidden @ matrix, axis=-1)
    targets = targets.at[:, ::2].set(likely[:, ::2]).at[:, 1].set(7)
    scores = jax.jit(mc.nn.token_scores)(hidden, matrix, targets)
    logits = hidden @ matrix
    np.testing.assert_array_equal(scores.greedy, likely == targets)
    wanted = jax.nn.log_softmax(logits)
    wanted = jnp.take_along_axis(wanted, targets[..., None], axis=-1)[..., 0]
    check(scores.log_probability, wanted, 1e-6)
    check(scores.log_partition, jax.nn.logsumexp(logits, axis=-1), 1e-6)
    got = jax.jit(jax.grad(score, (0, 1)))(hidden, matrix, targets)
    weights = jnp.full_like(hidden[..., 0], -1 / 3)
    wanted = gradients(plain, z_loss=0.0, scale=1.0)(hidden, matrix, weights, targets)[1]
    check(got, wanted[:2], 1e-6)


@pytest.mark.parametrize("kind", kept_of(["auto", "explicit"], "explicit"))
def test_a_mesh_divides_tokens_and_words(kind):
    hidden, matrix, targets, weights = arrays("float32")
    wanted = gradients(plain)(hidden, matrix, weights, targets)
    likely = jnp.argmax(hidden @ matrix, axis=-1)
    axes, shape = mc.sharding.AXES, (1, 2, 2, 2)
    mesh = mc.sharding.make_mesh(dict(zip(axes, shape, strict=True)))
    if kind == "explicit":
        mesh = jax.sharding.Mesh(mesh.devices, axes, axis_types=(AxisType.Explicit,) * 4)
    rows = PartitionSpec(("data", "fsdp"), "seq")
    specs = rows, PartitionSpec("fsdp", "tensor"), rows, rows
    with jax.set_mesh(mesh):
        placed = jax.device_put(
            (hidden, matrix, weights, targets), tuple(NamedSharding(mesh, spec) for spec in specs)
        )
        compiled = jax.jit(jax.value_and_grad(ours, (0, 1, 2))).lower(*placed).compile()
        check(jax.device_get(compiled(*placed)), wanted, 1e-5)
        scores = jax.jit(mc.nn.token_scores)(placed[0], placed[1], placed[3])
        np.testing.assert_array_equal(scores.greedy, likely == targets)
    gathered = [line for line in (compiled.as_text() or "").splitlines() if " all-gather(" in line]
    assert not any(f"[{ROWS},{LENGTH},{FEATURES}]" in line for line in gathered)


def test_arguments_that_do_not_fit_are_told(unchecked):
    hidden, matrix, targets, weights = arrays("float32")
    with pytest.raises(ValueError, match=r"matrix must be .* d = 8, got float32 \(24, 8\)"):
        mc.nn.cross_entropy(hidden, matrix.T, targets)
    with pytest.raises(ValueError, match=r"targets must be integer .* got float32"):
        mc.nn.token_scores(hidden, matrix, weights)
    with pytest.raises(ValueError, match=r"weights must be .* \(2, 12\), got float32 \(1, 12\)"):
        mc.nn.cross_entropy(hidden, matrix, targets, weights[:1])
