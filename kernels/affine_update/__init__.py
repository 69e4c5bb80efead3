"""Carrying matrices through chunks that each act on them as an affine map."""

from memcache_jax.kernels.affine_update.api import affine_update
from memcache_jax.kernels.affine_update.form import AffineChunk, OnChip

__all__ = ["AffineChunk", "OnChip", "affine_update"]
