"""Cross-entropy of an output layer without its logits: they exist for a piece of the tokens."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from memcache_jax._checks import check_array, check_number
from memcache_jax._typing import Array, Bool, Float, Int
from memcache_jax._varying import alike
from memcache_jax.nn.in_pieces import OutputLayer, gradient_dtype
from memcache_jax.sharding.layout import like


class CrossEntropy(NamedTuple):
    """What ``cross_entropy`` returns. The total's gradient is there already, the others' is not.

    Attributes:
      total: the weighted sum over all targets.
      log_probability: of each target, in nats.
      log_partition: log of the sum of the exponentials of its logits.
    """

    total: Float[Array, ""]
    log_probability: Float[Array, "b t"]
    log_partition: Float[Array, "b t"]


class TokenScores(NamedTuple):
    """What ``token_scores`` returns.

    Attributes:
      log_probability: of each target, in nats.
      log_partition: log of the sum of the exponentials of its logits.
      greedy: whether no token is more likely, nor as likely with a lower id.
    """

    log_probability: Float[Array, "b t"]
    log_partition: Float[Array, "b t"]
    greedy: Bool[Array, "b t"]


def cross_entropy(
    hidden: Float[Array, "b t d"],
    matrix: Float[Array, "d vocab"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"] | None = None,
    *,
    z_loss: float = 0.0,
    scale: float = 1.0,
) -> CrossEntropy:
    """Returns the cross-entropy of targets with the logits s h W, which are never held at once.

    With z_t = logsumexp(s h_t W)::

        total = sum over t of w_t (z_t - s h_t W[:, y_t] + z_loss z_t^2)

    The gradient of a sum is the sum of its parts' gradients, so that each piece of the tokens gives
    its own while it has its logits, in the forward pass: products are those of the plain loss,
    three, and what is kept is as large as the gradient. Fused losses of Liger (arXiv:2410.10989) do
    the same; Cut Cross-Entropy (arXiv:2411.09009) computes logits once more instead. The last term
    is the z-loss of arXiv:2204.02311.

    On a mesh each device takes its rows, its part of a sequence and its words.

    Args:
      hidden: what the output layer is given, h. Products have operands of its dtype, and sums of
        float32 or wider.
      matrix: the output layer's kernel W; for tied weights, the embedding's transpose.
      targets: the token that follows each position, y. Ids outside of the vocabulary give NaN.
      weights: of the targets, w; 1 by default. A target of weight 0 has no part in the total,
        whatever its id.
      z_loss: weight of the z-loss, which keeps logits from drifting.
      scale: factor of the logits, s.

    Raises:
      ValueError: for arrays whose shapes or dtypes do not fit, or numbers that are not finite.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> hidden, matrix = jnp.zeros((1, 3, 8)), jnp.zeros((8, 2))
      >>> targets, weights = jnp.array([[0, 1, -1]]), jnp.array([[1.0, 1.0, 0.0]])
      >>> print(mc.nn.cross_entropy(hidden, matrix, targets, weights).total.round(4))
      1.3863
    """
    _check(hidden, matrix, targets)
    z_loss, scale = (float(check_number(*x)) for x in (("z_loss", z_loss), ("scale", scale)))
    if weights is None:
        weights = jnp.ones_like(targets, jnp.float32)
    _check_rows("weights", weights, targets, jnp.floating)
    arrays: Any = alike(tuple(map(jnp.asarray, (hidden, matrix, targets, weights))))
    layer = OutputLayer.of(*arrays[:3], scale=scale, z_loss=z_loss)
    found: Any = _cross_entropy(layer, *arrays)
    return CrossEntropy(*found)


def token_scores(
    hidden: Float[Array, "b t d"],
    matrix: Float[Array, "d vocab"],
    targets: Int[Array, "b t"],
    *,
    scale: float = 1.0,
) -> TokenScores:
    """Returns how likely targets are, and whether each is the most likely token.

    Logits exist for a piece of the tokens, also in a backward pass.

    Args:
      hidden: as for ``cross_entropy``, as are the others.
      matrix: see hidden.
      targets: see hidden.
      scale: see hidden.

    Raises:
      ValueError: as for ``cross_entropy``.

    Example:
      >>> import jax.numpy as jnp, memcache_jax as mc
      >>> matrix = jnp.array([[0.0, jnp.log(3.0)]])
      >>> scores = mc.nn.token_scores(jnp.ones((1, 2, 1)), matrix, jnp.array([[0, 1]]))
      >>> jnp.exp(scores.log_probability).round(4).tolist(), scores.greedy.tolist()
      ([[0.25, 0.75]], [[False, True]])
    """
    _check(hidden, matrix, targets)
    arrays: Any = alike(tuple(map(jnp.asarray, (hidden, matrix, targets))))
    layer = OutputLayer.of(*arrays, scale=float(check_number("scale", scale)))
    return TokenScores(*layer.scores(*arrays))


def _check(hidden: Any, matrix: Any, targets: Any) -> None:
    shape, dtype = check_array("hidden", hidden)
    if len(shape) != 3 or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"hidden must be floats of shape (b, t, d), got {dtype} {shape}")
    of_matrix, dtype = check_array("matrix", matrix)
    fits = len(of_matrix) == 2 and of_matrix[0] == shape[2] and of_matrix[1] > 0
    if not fits or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"matrix must be floats of shape (d, vocab) with d = {shape[2]}, got {dtype} "
            f"{of_matrix}"
        )
    _check_rows("targets", targets, hidden, jnp.integer)


def _check_rows(name: str, got: Any, of: Any, kind: Any) -> None:
    """Raises ValueError unless an array has one number of a kind for each token."""
    (shape, dtype), wanted = check_array(name, got), jnp.shape(of)[:2]
    if shape != wanted or not jnp.issubdtype(dtype, kind):
        raise ValueError(
            f"{name} must be {kind.__name__} of shape (b, t) = {wanted}, got {dtype} {shape}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    layer: OutputLayer, hidden: Array, matrix: Array, targets: Array, weights: Array
) -> tuple[Array, Array, Array]:
    log_probability, log_partition, _ = layer.scores(hidden, matrix, targets)
    total = layer.total(log_probability, log_partition, weights)
    return total, log_probability, log_partition


def _forward(
    layer: OutputLayer, *arguments: CustomVJPPrimal
) -> tuple[tuple[Array, ...], tuple[tuple[Array, ...], tuple[Array, ...]]]:
    hidden, matrix, _, weights = arrays = tuple(x.value for x in arguments)
    *scores, d_hidden, d_matrix = layer.gradient(*arrays)
    total, d_weights = jax.value_and_grad(layer.total, argnums=2)(*scores, weights)
    d_matrix = d_matrix.astype(gradient_dtype(matrix))
    gradient = like(hidden, d_hidden), like(matrix, d_matrix), d_weights
    return (total, *scores), (gradient, arrays)


def _backward(
    layer: OutputLayer, kept: tuple[tuple[Array, ...], tuple[Array, ...]], cotangents: tuple
) -> tuple:
    gradient, (hidden, matrix, targets, weights) = kept
    of_total, *of_scores = cotangents
    if isinstance(of_total, SymbolicZero):
        of_total = jnp.zeros((), gradient[2].dtype)
    arrays = zip(gradient, (hidden, matrix, weights), strict=True)
    d_hidden, d_matrix, d_weights = ((of_total * d).astype(x.dtype) for d, x in arrays)
    if not all(isinstance(x, SymbolicZero) for x in of_scores):
        scores, pull = jax.vjp(lambda h, w: layer.scores(h, w, targets)[:2], hidden, matrix)
        d_scores = tuple(
            jnp.zeros_like(score) if isinstance(d, SymbolicZero) else d
            for score, d in zip(scores, of_scores, strict=True)
        )
        more = pull(d_scores)
        d_hidden, d_matrix = d_hidden + more[0], d_matrix + more[1]
    return d_hidden, d_matrix, None, d_weights


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
