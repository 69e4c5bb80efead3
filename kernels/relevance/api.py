"""Entry point of the relevance of segments."""

from memcache_jax._typing import Array, Float
from memcache_jax.kernels._dispatch import choose, implementations

_IMPLEMENTATIONS = implementations("relevance", "reference", "pallas_tpu")


def relevance(
    connector: Float[Array, "b h n c k"],
    key: Float[Array, "b h n c k"],
    *,
    pooling: str,
    implementation: str,
) -> tuple[Float[Array, "b h n c r"], Float[Array, "b h n c"]]:
    """Returns <u_t, p_i> of the segments i before a token's, and of its own up to the token.

    Segments are blocks of c tokens, and p_i is the mean or the sum of a segment's keys. A key that
    is not finite makes its segment's products NaN, and is left out of those of the live segment.

    Args:
      connector: the vectors u.
      key: the keys.
      pooling: ``"mean"`` or ``"sum"``.
      implementation: ``"reference"`` or ``"pallas_tpu"``.

    Returns:
      The products with the first r = n - 1 segments, 0 for those that do not precede the token's,
      and with the live one, in float32 or wider.

    Raises:
      ValueError: for an unknown implementation.
      NotImplementedError: if the implementation is missing or cannot take these arguments, with the
        reasons.
    """
    return choose("relevance", _IMPLEMENTATIONS, implementation)(connector, key, pooling)
