"""The training state, one update of it, and an evaluation."""

import functools
import math
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.sharding import Mesh

from memcache_jax._typing import Array, Float, Int
from memcache_jax.nn import LanguageModel, LanguageModelConfig
from memcache_jax.nn.language_model import abstract_model
from memcache_jax.sharding import constrain, param_shardings, state_shardings
from memcache_jax.training.data import HeldOut
from memcache_jax.training.distributed import place_rows
from memcache_jax.training.documents import document_ids

Params = dict[str, Any]


class TrainState(NamedTuple):
    """The parameters, as nested dictionaries of arrays, and the optimizer's state.

    Attributes:
      params: those that are trained.
      opt_state: of these alone.
      frozen: those that are not.
    """

    params: Params
    opt_state: optax.OptState
    frozen: Params = {}  # noqa: RUF012  # never changed

    @property
    def whole(self) -> Params:
        """The parameters of the model."""
        return joined(self.params, self.frozen)


def joined(first: Params, second: Params) -> Params:
    """Parameters of both."""
    if not second:
        return first
    return unflatten_dict(flatten_dict(first) | flatten_dict(second))


def abstract_state(
    config: LanguageModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    frozen: Set[tuple] = frozenset(),
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns the model without its arrays, and the shapes and dtypes of a state.

    ``nnx.merge(graph, state.whole)`` restores the model. With a mesh, each leaf also has its
    sharding. ``frozen`` are the paths of parameters that are not trained; all others are then
    float32 or wider.
    """
    graph, state = abstract_model(config)
    params, kept = _divided(pure(state), frozen)
    if frozen:
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params
        )
    target = TrainState(params, jax.eval_shape(optimizer.init, params), kept)
    if mesh is not None:
        of_params, of_kept = _divided(_string_keys(param_shardings(state, mesh)), frozen)
        of_optimizer = state_shardings(optimizer, params, of_params, mesh)
        shardings = TrainState(of_params, of_optimizer, of_kept)
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
    """Returns the initial state, created on its devices.

    ``target`` is from ``abstract_state`` with a mesh; None for the default device.
    """

    def create(key: Array) -> TrainState:
        model = LanguageModel(config, rngs=nnx.Rngs(key))
        params = pure(nnx.state(model, nnx.Param))
        return TrainState(params, optimizer.init(params))

    return jax.jit(create, out_shardings=_shardings(target))(jax.random.key(seed))


def _shardings(target: TrainState | None) -> Any:
    return None if target is None else jax.tree.map(lambda x: x.sharding, target)


def pure(state: nnx.State) -> Params:
    """The parameters of a state as nested dictionaries, as a checkpoint has them."""
    return _string_keys(nnx.to_pure_dict(state))


def _divided(params: Params, frozen: Set[tuple]) -> tuple[Params, Params]:
    """Those that are trained, and those that are not."""
    if not frozen:
        return params, {}
    flat = flatten_dict(params)
    trained = {path: x for path, x in flat.items() if path not in frozen}
    return unflatten_dict(trained), unflatten_dict({path: flat[path] for path in frozen})


def _string_keys(tree: Any) -> Any:
    """Turns list indices into strings, as in a restored checkpoint."""
    if isinstance(tree, dict):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    z_loss: float = 0.0,
    accumulate: int = 1,
    target: TrainState | None = None,
    end_token: int | None = None,
) -> Callable[[TrainState, Int[Array, "b l"]], tuple[TrainState, dict[str, Array]]]:
    """Returns the jitted update (state, tokens) -> (state, metrics); the old state is donated.

    The metrics are ``loss`` (mean cross-entropy in nats per token), ``z_loss`` (``z_loss`` times
    the mean squared log-partition) and ``gradient_norm`` before clipping, all with the parameters
    before the update.

    Args:
      graph: as from ``abstract_state``.
      optimizer: as from ``make_optimizer``.
      z_loss: weight of the z-loss, which keeps logits from drifting.
      accumulate: number of parts of a batch whose gradients are computed in sequence and averaged.
      target: from ``abstract_state`` with a mesh; the new state keeps its shardings.
      end_token: the id that ends a document, to keep those of one row apart (``documents.py``);
        None to let them see each other.
    """

    def loss_fn(params: Params, frozen: Params, tokens: Array) -> tuple[Array, dict[str, Array]]:
        model = nnx.merge(graph, joined(params, frozen))
        hidden, targets = _hidden(model, tokens, end_token), tokens[:, 1:]
        total, log_probability, log_partition = model.cross_entropy(hidden, targets, z_loss=z_loss)
        metrics = {
            "loss": -log_probability.mean(),
            "z_loss": z_loss * jnp.mean(log_partition**2),
        }
        return total / targets.size, metrics

    def mean_gradient(state: TrainState, tokens: Array) -> tuple[Params, dict[str, Array]]:
        gradient = functools.partial(jax.grad(loss_fn, has_aux=True), state.params, state.frozen)
        if accumulate == 1:
            return gradient(tokens)
        parts = _parts(tokens, accumulate)

        def add(total: Any, part: Array) -> tuple[Any, None]:
            part = constrain(part, "batch", None)
            return jax.tree.map(jnp.add, total, gradient(part)), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, parts[0]))
        total, _ = lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    def train_step(state: TrainState, tokens: Array) -> tuple[TrainState, dict[str, Array]]:
        gradient, metrics = mean_gradient(state, tokens)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.frozen), metrics

    shardings = None if target is None else (_shardings(target), None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)


def _parts(rows: Array, count: int) -> Array:
    """Divides a batch: (parts, rows of each, ...)."""
    # Strided, so that every device has rows of each part.
    return jnp.moveaxis(rows.reshape(-1, count, *rows.shape[1:]), 1, 0)


def make_eval_step(
    graph: nnx.GraphDef, end_token: int | None = None, accumulate: int = 1
) -> Callable[[Params, Int[Array, "b l"], Float[Array, "b"]], tuple[Array, Array]]:
    """Returns jitted (params, tokens, mask) -> (summed loss in nats, number of targets).

    Rows with mask 0, which pad the last batch, do not count. ``end_token`` and ``accumulate`` are
    as for ``make_train_step``: in the same parts it needs no more memory than an update.
    """

    def summed(params: Params, tokens: Array, mask: Array) -> tuple[Array, Array]:
        model = nnx.merge(graph, params)
        hidden, targets = _hidden(model, tokens, end_token), tokens[:, 1:]
        loss = -model.token_scores(hidden, targets).log_probability
        return jnp.sum(loss * mask[:, None]), jnp.sum(mask) * loss.shape[1]

    def eval_step(params: Params, tokens: Array, mask: Array) -> tuple[Array, Array]:
        if accumulate == 1:
            return summed(params, tokens, mask)

        def add(total: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
            tokens, mask = constrain(part[0], "batch", None), constrain(part[1], "batch")
            return jax.tree.map(jnp.add, total, summed(params, tokens, mask)), None

        parts = _parts(tokens, accumulate), _parts(mask, accumulate)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(summed, params, *first))
        return lax.scan(add, zeros, parts)[0]

    return jax.jit(eval_step)


def _hidden(model: LanguageModel, tokens: Array, end_token: int | None) -> Array:
    """Returns what the output layer is given at the position before each target."""
    inputs = tokens[:, :-1]
    documents = () if end_token is None else (document_ids(inputs, end_token),)
    return model.hidden(inputs, *documents)


def evaluate(
    eval_step: Callable[..., tuple[Array, Array]],
    params: Params,
    heldout: HeldOut,
    batch_size: int,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Evaluates a model on held-out rows, ``batch_size`` at a time.

    Returns:
      ``heldout_loss`` in nats per token, ``heldout_bits_per_byte``, and ``heldout_perplexity`` per
      token.
    """
    # Padded to one shape, so that the last batch needs no compilation of its own.
    rows = len(heldout.tokens)
    tokens = np.pad(heldout.tokens, ((0, -rows % batch_size), (0, 0)))
    mask = (np.arange(len(tokens)) < rows).astype(np.float32)
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
