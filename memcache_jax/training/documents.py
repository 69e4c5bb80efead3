"""Documents that are packed into one row: which one each token is of, and who can keep them apart.

An end token closes a document as a target and opens the next one as an input: the first token of a
document is predicted from the end token alone, as in ``generate`` where the prompt is empty. So
every target stays in the loss, none is predicted from another document, and losses are means over
the same targets as those of a run whose documents see each other.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memcache_jax._typing import Array, Int
from memcache_jax.training.config import Config


def document_ids(inputs: Int[Array, "b t"], end_token: int) -> Int[Array, "b t"]:
    """Returns the document of each input token, counted from 0 in each row.

    Example:
      >>> import jax.numpy as jnp
      >>> document_ids(jnp.array([[5, 6, 9, 7, 9, 9, 8]]), 9).tolist()
      [[0, 0, 1, 1, 2, 3, 3]]
    """
    return jnp.cumsum(inputs == end_token, axis=1, dtype=jnp.int32)


def separator(config: Config, end_token: int, graph: nnx.GraphDef, params: Any) -> int | None:
    """Returns the token that parts the documents of a row; None if they may see each other.

    Runs the model's shapes with ``document_ids``, on the mesh of ``jax.set_mesh`` if there is one,
    so that a model that does not take them is told before anything else happens.

    Args:
      config: of the run, with ``data.isolate_documents`` decided.
      end_token: the tokenizer's.
      graph: as from ``abstract_state``.
      params: arrays, or their shapes and dtypes.

    Raises:
      ValueError: if documents are to be isolated, but the model takes no ``document_ids``.
    """
    if not config.data.isolate_documents:
        return None
    rows = config.batch_size // config.accumulate
    tokens = jax.ShapeDtypeStruct((rows, config.sequence_length), jnp.int32)

    def run(*inputs: Any) -> None:
        jax.eval_shape(lambda params, *inputs: nnx.merge(graph, params)(*inputs), params, *inputs)

    try:
        run(tokens, tokens)
    except (ValueError, TypeError, NotImplementedError) as e:
        run(tokens)  # raises if documents are not the reason
        raise ValueError(
            "data.isolate_documents needs a model that takes document_ids, which this one does "
            f"not: {e}. With --config.data.isolate_documents=False, documents that are packed into "
            "one row see each other"
        ) from e
    return end_token
