"""Training aids for the routers of ``SSC``: noise on their scores and a load-balancing loss."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax._checks import check_instance, check_key, check_number
from memcache_jax._typing import Array, Float
from memcache_jax.engine.load import balance, load_of_tokens
from memcache_jax.nn.stack import repeats_of
from memcache_jax.sharding.division import Division
from memcache_jax.sharding.layout import like
from memcache_jax.sparse import SSC

Model = TypeVar("Model", bound=nnx.Module)


class RouterLoss(nnx.Intermediate):
    """Load-balancing losses of the layers with ``SSC``, which ``nnx.capture`` collects.

    Eq. 4 of the Switch Transformer (arXiv:2101.03961), with states for experts. For each head::

        loss = N sum_i f_i P_i

    where f_i is state i's share of a batch's selections, and P_i its mean softmax probability among
    the N cached states. Here N differs between tokens, which see only the states before them: f_i
    and P_i are in units of each token's 1 / N, averaged over the tokens that see state i and more
    states than they select. The loss is 1 if tokens spread evenly, and at most N / k. Each layer
    has one, the mean over heads; streams and calls without ``nnx.capture`` compute none.

    Example:
      >>> import jax, jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> layer = mc.nn.MemoryCaching(8, 2, memory=mc.memories.SSD(), rngs=nnx.Rngs(0),
      ...                             aggregation=mc.SSC(top_k=1), segmentation=mc.Constant(4))
      >>> y, losses = nnx.capture(layer, mc.nn.RouterLoss)(jnp.ones((1, 14, 8)))
      >>> [loss.shape for loss in jax.tree.leaves(losses)]
      [()]
    """


class RouterNoise(nnx.Variable):
    """The key and scale of a layer's router noise, set by ``with_router_noise``."""


def with_router_noise(model: Model, key: Array, scale: float) -> Model:
    """Returns a model whose routers see noisy connectors, for one training step.

    A router scores state i by <u_t, p_i>. With noise, u_t becomes u_t + scale |u_t| e / sqrt(k),
    where e is standard normal in k dimensions. Every score, and through it every gate, then has
    Gaussian noise of standard deviation scale |u_t| |p_i| / sqrt(k): with a scale of 1, that of the
    score of a random direction. As for experts in arXiv:1701.06538, tokens try states that they
    would not otherwise select. The given model is unchanged; streams of the new one have no noise.

    Args:
      model: a layer, a language model, or any module with layers that have ``SSC`` with
        ``gate="content"``.
      key: a random key, new for each step. Every layer draws from its own.
      scale: the scale of the noise.

    Raises:
      ValueError: for a model without such layers, or a scale that is not a number of at least 0.

    Example:
      >>> import jax, jax.numpy as jnp, memcache_jax as mc
      >>> from flax import nnx
      >>> layer = mc.nn.MemoryCaching(8, 2, memory=mc.memories.SSD(), rngs=nnx.Rngs(0),
      ...                             aggregation=mc.SSC(top_k=1), segmentation=mc.Constant(4))
      >>> noisy = mc.nn.with_router_noise(layer, jax.random.key(0), 0.5)
      >>> bool(jnp.allclose(noisy(jnp.ones((1, 14, 8))), layer(jnp.ones((1, 14, 8)))))
      False
    """
    check_instance("model", model, nnx.Module, "a Flax NNX module")
    scale = check_number("scale", scale, "a number of at least 0", lambda x: x >= 0)
    noisy = nnx.clone(model)
    routers: list[Any] = [part for _, part in nnx.iter_modules(noisy) if _routes(part)]
    if not routers:
        raise ValueError("noise is for routers: the model has no layer with SSC and gate='content'")
    key = check_key(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    for layer, own in zip(routers, jax.random.split(key, len(routers)), strict=True):
        repeats = repeats_of(layer)
        own = own if repeats is None else jax.random.split(own, repeats)
        layer.router_noise = RouterNoise((own, jnp.full(own.shape, float(scale))))
    return noisy


def _routes(part: Any) -> bool:
    aggregation = getattr(part, "aggregation", None)
    if not isinstance(aggregation, SSC) or getattr(part, "follows", False):
        return False
    return aggregation.relevance.connector == "key"


def noisy(layer: Any, tokens: dict[str, Any]) -> dict[str, Any]:
    """A layer's per-token arguments, with noise in the connector if the layer has any."""
    if not hasattr(layer, "router_noise"):
        return tokens
    (key, scale), connector = layer.router_noise.get_value(), tokens["connector"]
    wide = jax.lax.stop_gradient(connector)
    wide = wide.astype(jnp.promote_types(wide.dtype, jnp.float32))
    size = scale * jnp.linalg.norm(wide, axis=-1, keepdims=True) / wide.shape[-1] ** 0.5
    normal = like(wide, jax.random.normal(key, wide.shape, wide.dtype))
    return tokens | dict(connector=connector + (size * normal).astype(connector.dtype))


def sow_load(
    layer: Any,
    tokens: dict[str, Any],
    document_ids: Array | None,
    pooled: Float[Array, "b h states k"] | None,
) -> None:
    """Sows a layer's ``RouterLoss`` if ``nnx.capture`` asks for it."""
    captures = getattr(layer, "__captures__", ())
    if not any(type(variable) is RouterLoss for variable in captures) or not _routes(layer):
        return
    how: dict[str, Any] = dict(aggregation=layer.aggregation, segmentation=layer.segmentation)
    rows = tokens["key"], tokens["connector"], document_ids, pooled

    def local(*rows: Any) -> Any:
        return load_of_tokens(*rows, **how)

    letters = "b t h .", "b t h .", "b t", "b h . ."
    division = Division.of(*zip(rows, letters, strict=True))
    if division is None:
        load = local(*rows)
    else:
        given = tuple(None if x is None else of for x, of in zip(rows, letters, strict=True))
        load = division.whole("t").run(local, rows, given, ("b h .",) * 3)
    layer.sow(RouterLoss, "router_loss", balance(*load))
