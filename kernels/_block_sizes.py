"""Block sizes of the kernels: measured ones from the table, or its defaults."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax

from memcache_jax.kernels._table import TABLE

_Sizes = TypeVar("_Sizes")
_DEVICE_KIND = contextvars.ContextVar[str | None]("device_kind", default=None)
_TRIAL = contextvars.ContextVar[tuple[str, Mapping[str, int], set] | None]("trial", default=None)


@contextlib.contextmanager
def tuned_for(device_kind: str) -> Iterator[None]:
    """Traces kernels with the block sizes measured on a kind of device.

    Args:
      device_kind: the kind, as in ``jax.Device.device_kind``, such as ``"TPU v5 lite"``. Outside
        this context it is the kind of ``jax_default_device``, if that is set. Devices that are
        merely present do not count, since a program may be compiled for others.
    """
    token = _DEVICE_KIND.set(device_kind)
    try:
        yield
    finally:
        _DEVICE_KIND.reset(token)


@contextlib.contextmanager
def tried(name: str, sizes: Mapping[str, int]) -> Iterator[set[tuple[str, str]]]:
    """Traces the kernels of one operation and implementation with these block sizes.

    Yields:
      A set that collects the name and the table row of every choice made meanwhile.
    """
    asked: set[tuple[str, str]] = set()
    token = _TRIAL.set((name, sizes, asked))
    try:
        yield asked
    finally:
        _TRIAL.reset(token)


def block_sizes(sizes: type[_Sizes], name: str, shape: str, dtype: Any) -> _Sizes:
    """Returns the measured block sizes, or the defaults.

    Args:
      sizes: the dataclass to fill.
      name: the operation and the implementation, ``"bank_read/pallas_tpu"``.
      shape: the shape to look up, as in the table's keys.
      dtype: the dtype of the rows.
    """
    rows = TABLE[name]
    device = getattr(jax.config, "jax_default_device", None)
    kind = _DEVICE_KIND.get() or getattr(device, "device_kind", None)
    key = row_key(kind, shape, dtype)
    if (trial := _TRIAL.get()) is not None:
        tried_name, tried_sizes, asked = trial
        asked.add((name, key))
        if name == tried_name:
            return sizes(**tried_sizes)
    return sizes(**rows.get(key, rows["default"]))


def row_key(device_kind: str | None, shape: str, dtype: Any) -> str:
    """The key of a row of the table."""
    return f"{device_kind} {shape} {jax.numpy.dtype(dtype).name}"
