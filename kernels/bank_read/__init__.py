"""Gated read of a bank of memory states."""

from memcache_jax.kernels.bank_read.api import bank_read

__all__ = ["bank_read"]
