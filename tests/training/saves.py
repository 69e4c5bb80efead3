"""States to save, and ways to make a save fail."""

import contextlib
import resource
import signal

import jax.numpy as jnp

from memcache_jax.training.step import TrainState


def state_of(step):
    params = {"layer": {"0": {"kernel": jnp.arange(5000.0) * step}}, "scale": jnp.float32(step)}
    return TrainState(params, (jnp.int32(step), {"mu": jnp.ones(3) * step}))


def truncate(pattern):
    def damage(checkpoint):
        files = [path for path in checkpoint.glob(pattern) if path.is_file()]
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


@contextlib.contextmanager
def no_space(size):
    """Makes every write beyond ``size`` bytes of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
