"""The gates of a trained model: how much each token of a text reads from each state."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from memcache_jax._typing import Array
from memcache_jax.adaptive import Adaptive
from memcache_jax.aggregation import Residual
from memcache_jax.nn import LanguageModel, MemoryCachingMixer
from memcache_jax.nn.parallel import side_by_side
from memcache_jax.nn.recurrent import RecurrentMixer
from memcache_jax.training.tokenizers import Tokenizer

CACHING = (MemoryCachingMixer, RecurrentMixer)


def inspect(model: LanguageModel, tokenizer: Tokenizer, tokens: np.ndarray) -> dict[str, Any]:
    """Returns the gates of every token of a text.

    Args:
      model: a language model whose memory caching has gates.
      tokenizer: its tokenizer.
      tokens: ids, (t,).

    Returns:
      ``tokens``, the text of each token; and ``layers``, with an entry for each mixer with memory
      caching: its ``block`` and ``name``, the tokens [begin, end) of each cached state in
      ``states``, the positions where segments ``begin``, and ``gates`` (t, heads, states + 1), the
      live state last.

    Raises:
      ValueError: if there are no tokens, or the model has no gates, or segments whose borders
        depend on the text, ``Adaptive``.
    """
    config = model.config
    mixers = [config.mixers[i % len(config.mixers)] for i in range(config.num_layers)]
    parts = [side_by_side(mixer) for mixer in mixers]
    caching = [mixer for sides in parts for mixer in sides.values() if isinstance(mixer, CACHING)]
    if not caching:
        raise ValueError(f"the model has no memory caching: its mixers are {mixers}")
    if all(isinstance(mixer.aggregation, Residual) for mixer in caching):
        raise ValueError("the model has no gates: Residual reads all states alike")
    for mixer in caching:
        if isinstance(mixer.segmentation, Adaptive):
            raise ValueError(
                f"borders of {mixer.segmentation} depend on the text, and are not shown: inspect a "
                "model with another segmentation"
            )
    if not len(tokens):
        raise ValueError("the text has no tokens")
    graph, state = nnx.split(model)

    def gates_of(state: nnx.State, tokens: Array) -> list[Any]:
        return nnx.merge(graph, state).gates(tokens)

    layers = []
    for block, found in enumerate(jax.jit(gates_of)(state, tokens[None])):
        for side, mixer in parts[block].items():
            gates = found.get(side) if isinstance(found, dict) else found
            if gates is None or not isinstance(mixer, CACHING):
                continue
            plan = mixer.segmentation.plan(len(tokens))
            what = f"{type(mixer.memory).__name__}, {mixer.aggregation}, {mixer.segmentation}"
            layers.append(
                dict(
                    block=block,
                    name=f"layer {block}{side and ' ' + side}: {what}",
                    states=(plan.buckets * plan.block_size).tolist(),
                    begin=(np.unique(plan.first) * plan.block_size).tolist(),
                    gates=np.asarray(gates[0]),
                )
            )
    return dict(tokens=pieces(tokenizer, tokens), layers=layers)


def pieces(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> list[str]:
    """Returns the text of each token; a character of several tokens belongs to the last one."""
    found, shown = [], 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        complete = not text.endswith("\ufffd") or end == len(tokens)
        found.append(text[shown:] if complete else "")
        shown = len(text) if complete else shown
    return found
