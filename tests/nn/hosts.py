"""Four rows as hosts pad and pack them, and what they pass to attention with them."""

import jax
import jax.numpy as jnp
import numpy as np

import memcache_jax as mc
from tests.nn.caches import FEATURES, HEADS, caching

LENGTH = 21
LAYERS = {
    "ssd, grm": lambda rngs: caching(rngs, mc.memories.SSD(), mc.GRM()),
    "titans, grm": lambda rngs: caching(
        rngs, mc.memories.Titans(chunk_size=4, expansion=2), mc.GRM()
    ),
    "gated deltanet, ssc": lambda rngs: caching(rngs, mc.memories.GatedDeltaNet(), mc.SSC(top_k=2)),
    "attention": lambda rngs: mc.nn.Attention(FEATURES, HEADS, rngs=rngs),
    "window": lambda rngs: mc.nn.Attention(FEATURES, HEADS, window=5, rngs=rngs),
}
# The rows' documents, (row, begin, end): padded on the left, whole, padded on the right, packed.
DOCUMENTS = ((0, 5, 21), (1, 0, 21), (2, 0, 13), (3, 0, 8), (3, 8, 21))
SEGMENTS = np.zeros((4, LENGTH), int)
for row, begin, end in DOCUMENTS:
    SEGMENTS[row, begin:end] = 1 + (begin == 8)
VALID = SEGMENTS > 0
SAME = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & np.tri(LENGTH, dtype=bool)
COUNT = np.maximum(np.cumsum(VALID, axis=1) - 1, 0) - 8 * (SEGMENTS == 2)
POSITIONS = {
    "zeros and repeats": COUNT,  # Tunix and Gemma
    "negative": np.where(VALID, COUNT, -1),
    "from a negative": np.where(np.arange(4)[:, None] == 0, np.arange(LENGTH) - 5, COUNT),
    "ones": np.where(VALID, COUNT, 1),  # Transformers
}
MASKS = {
    "of keys": SAME & VALID[:, None],  # Tunix and Gemma
    "of both": (SAME & VALID[:, None] & VALID[..., None])[:, None].astype(np.float32),  # Flax
    "in all heads": np.tile((SAME & VALID[:, None])[:, None], (1, HEADS, 1, 1)).astype(np.int32),
}


def inputs():
    return jax.random.normal(jax.random.key(0), (4, LENGTH, FEATURES))


def alone(x):
    """Each document at the beginning of a row; what comes after it is not seen."""
    rows = [jnp.roll(x[row], -begin, axis=0) for row, begin, _ in DOCUMENTS]
    return jnp.stack(rows)


def picked(y, documents=DOCUMENTS):
    """The outputs of each document of padded and packed rows."""
    return [y[row, begin:end] for row, begin, end in documents]


def separate(y, documents=DOCUMENTS):
    """The outputs of each document of rows of its own."""
    return [y[DOCUMENTS.index(d), : d[2] - d[1]] for d in documents]
