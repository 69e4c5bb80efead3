"""The training step: creation of the state, one jitted update, one evaluation."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn import LanguageModel, LanguageModelConfig
from memcache_jax.sharding import constrain, param_shardings, state_shardings
from memcache_jax.training.data import HeldOut
from memcache_jax.training.distributed import place_rows

Params = dict[str, Any]


class TrainState(NamedTuple):
    """What a step changes: nested dictionaries of arrays, and the optimizer's state."""

    params: Params
    opt_state: optax.OptState


def abstract_state(
    config: LanguageModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns the model without its arrays, and the shapes and dtypes of a state.

    ``nnx.merge(graph, state.params)`` is the model again. With a mesh, each leaf also has the
    sharding with which it lives there.
    """
    # Not nnx.eval_shape, which under a mesh takes the names of axes for those of the mesh.
    graph, state = jax.eval_shape(
        lambda: nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    )
    params = _string_keys(nnx.to_pure_dict(state))
    target = TrainState(params, jax.eval_shape(optimizer.init, params))
    if mesh is not None:
        of_params = _string_keys(param_shardings(state, mesh))
        shardings = TrainState(of_params, state_shardings(optimizer, params, of_params, mesh))
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            target,
            shardings,
        )
    return graph, target


def create_state(
    config: LanguageModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    target: TrainState | None = None,
) -> TrainState:
    """Returns the state before the first step, made on the devices it is to live on.

    Args:
      config: the model's shape.
      optimizer: as from ``make_optimizer``.
      seed: decides the initial parameters.
      target: from ``abstract_state`` with a mesh; the default device where it is None.
    """

    def create(key: Array) -> TrainState:
        model = LanguageModel(config, rngs=nnx.Rngs(key))
        params = _string_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        return TrainState(params, optimizer.init(params))

    return jax.jit(create, out_shardings=_shardings(target))(jax.random.key(seed))


def _shardings(target: TrainState | None) -> Any:
    return None if target is None else jax.tree.map(lambda x: x.sharding, target)


def _string_keys(tree: Any) -> Any:
    """The places in a list become strings, as they come back from a checkpoint."""
    if isinstance(tree, dict):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    z_loss: float = 0.0,
    accumulate: int = 1,
    target: TrainState | None = None,
) -> Callable[[TrainState, Int[Array, "b l"]], tuple[TrainState, dict[str, Array]]]:
    """Returns the jitted update (state, tokens) -> (state, metrics); the old state is donated.

    Metrics, each of the given tokens with the parameters before the update: ``loss`` (mean
    cross-entropy in nats per token), ``z_loss`` (``z_loss`` times the mean squared
    log-partition) and ``gradient_norm`` before clipping.

    Args:
      graph: the model, as from ``abstract_state``.
      optimizer: as from ``make_optimizer``.
      z_loss: weight of the z-loss, which keeps logits from drifting.
      accumulate: into how many parts a batch is divided, whose gradients are computed one after
        the other and averaged.
      target: from ``abstract_state`` with a mesh: the new state lies where the old one did.
    """

    def loss_fn(params: Params, tokens: Array) -> tuple[Array, dict[str, Array]]:
        loss, log_partition = _cross_entropy(graph, params, tokens)
        metrics = {"loss": loss.mean(), "z_loss": z_loss * jnp.mean(log_partition**2)}
        return metrics["loss"] + metrics["z_loss"], metrics

    def mean_gradient(params: Params, tokens: Array) -> tuple[Params, dict[str, Array]]:
        gradient = jax.grad(loss_fn, has_aux=True)
        if accumulate == 1:
            return gradient(params, tokens)
        # Every device has some rows of each part.
        parts = jnp.moveaxis(tokens.reshape(-1, accumulate, tokens.shape[1]), 1, 0)

        def add(total: Any, part: Array) -> tuple[Any, None]:
            part = constrain(part, "batch", None)
            return jax.tree.map(jnp.add, total, gradient(params, part)), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, parts[0]))
        total, _ = lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    def train_step(state: TrainState, tokens: Array) -> tuple[TrainState, dict[str, Array]]:
        gradient, metrics = mean_gradient(state.params, tokens)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state), metrics

    shardings = None if target is None else (_shardings(target), None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)


def make_eval_step(
    graph: nnx.GraphDef,
) -> Callable[[Params, Int[Array, "b l"], Float[Array, "b"]], tuple[Array, Array]]:
    """Returns jitted (params, tokens, mask) -> (summed loss in nats, number of targets).

    Rows whose mask is 0 do not count; they fill up a last batch.
    """

    def eval_step(params: Params, tokens: Array, mask: Array) -> tuple[Array, Array]:
        loss, _ = _cross_entropy(graph, params, tokens)
        return jnp.sum(loss * mask[:, None]), jnp.sum(mask) * loss.shape[1]

    return jax.jit(eval_step)


def _cross_entropy(graph: nnx.GraphDef, params: Params, tokens: Array) -> tuple[Array, Array]:
    """The loss of each target in float32 or wider, and the log-partition that it contains."""
    logits = nnx.merge(graph, params)(tokens[:, :-1])
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return log_partition - target, log_partition


def evaluate(
    eval_step: Callable[..., tuple[Array, Array]],
    params: Params,
    heldout: HeldOut,
    batch_size: int,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Measures a model on held-out rows.

    Args:
      eval_step: as from ``make_eval_step``.
      params: the model's parameters.
      heldout: the rows.
      batch_size: rows at a time.
      mesh: where they go; the default device where it is None.

    Returns:
      ``heldout_loss`` in nats per token, ``heldout_bits_per_byte``, and ``heldout_perplexity`` per
      token.
    """
    tokens = heldout.tokens
    mask = np.ones(len(tokens), np.float32)
    # One shape for all batches, or the last would compile anew.
    missing = -len(tokens) % batch_size
    tokens = np.concatenate([tokens, np.zeros((missing, tokens.shape[1]), tokens.dtype)])
    mask = np.concatenate([mask, np.zeros(missing, np.float32)])
    sums = [
        eval_step(params, *(place_rows(x[i : i + batch_size], mesh) for x in (tokens, mask)))
        for i in range(0, len(tokens), batch_size)
    ]
    totals, counts = zip(*jax.device_get(sums), strict=True)
    loss = math.fsum(totals) / math.fsum(counts)
    return {
        "heldout_loss": loss,
        "heldout_bits_per_byte": loss / math.log(2) / heldout.bytes_per_token,
        "heldout_perplexity": math.exp(min(loss, 700.0)),
    }
