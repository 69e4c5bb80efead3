"""Whether trained routers find the states that hold the answers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments._fit import Fitted, Questions
from memcache_jax._typing import Array, Bool


def found(fitted: Fitted, questions: Questions) -> list[list[float]]:
    """The share of questions for which the router finds the state, by replica and layer.

    A router finds it if any head selects the segment with the question's pair; an oracle's share is
    1. Questions whose pair is in the live segment do not count. Layers must have ``SSC`` and
    ``Constant`` segments.
    """
    every, asked = map(np.asarray, _hits(fitted.graph, fitted.params, questions))
    shares = (every & asked[:, None]).sum(axis=(-2, -1)) / asked.sum(axis=(-2, -1))[:, None]
    return np.round(shares, 4).tolist()


@functools.partial(jax.jit, static_argnums=0)
def _hits(
    graph: nnx.GraphDef, params: Any, questions: Questions
) -> tuple[Bool[Array, "replicas layers b n"], Bool[Array, "replicas b n"]]:
    """Whether each layer finds a question's segment, and whether that segment is cached."""
    tokens, places, _ = questions
    asked = jnp.take_along_axis(tokens, places, axis=1)
    pairs = 2 * asked.shape[1]  # tokens of all pairs, which come first: keys at even places
    key = 2 * jnp.argmax(tokens[:, None, :pairs:2] == asked[..., None], axis=-1)

    def of_replica(params: Any) -> tuple[Array, Array]:
        model = nnx.merge(graph, params)
        size = model.config.stacks[0][0][0].mixer.segmentation.size
        segment = (key + 1) // size  # of the pair's value, whose token writes the pair
        layers = []
        for gates in model.gates(tokens):
            at = jnp.take_along_axis(gates, places[:, :, None, None], axis=1)
            own = jnp.take_along_axis(at, segment[:, :, None, None], axis=-1)[..., 0]
            layers.append((own > 0).any(axis=-1))
        return jnp.stack(layers), segment < places // size

    return jax.vmap(of_replica)(params)
