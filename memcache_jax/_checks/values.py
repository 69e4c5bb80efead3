"""Checks of single values: numbers, names, dtypes, arrays, and objects of our classes."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

T = TypeVar("T")

LARGEST = 2**31 - 1
"""The largest int32, which positions and sizes are."""


def check_integer(
    name: str, got: Any, least: int = 1, *, most: int = LARGEST, optional: bool = False
) -> Any:
    """Returns an integer, of Python's or of NumPy's types, as an ``int``; or raises ValueError.

    Booleans are refused. Where it is ``optional``, None stays None.
    """
    if got is None and optional:
        return None
    number = _plain(got)
    if not isinstance(number, int):
        raise ValueError(f"{name} must be an integer, got {shown(got)}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return number


def check_sizes(**sizes: Any) -> tuple[int, ...]:
    """Returns integers of at least 1, or raises ValueError."""
    return tuple(check_integer(name, size) for name, size in sizes.items())


def check_number(
    name: str,
    got: Any,
    wanted: str = "a finite number",
    good: Callable[[Any], bool] = lambda _: True,
) -> Any:
    """Returns a finite number as Python's, or raises ValueError unless it is ``good``.

    Args:
      name: what it is called.
      got: the number.
      wanted: what a good one is, such as ``"in (0, 1]"``, for the error.
      good: tells whether it is.
    """
    number = _plain(got)
    finite = isinstance(number, int) or (isinstance(number, float) and math.isfinite(number))
    if not finite or not good(number):
        raise ValueError(f"{name} must be {wanted}, got {shown(got)}")
    return number


def check_flag(name: str, got: Any) -> bool:
    """Returns a boolean, or raises ValueError."""
    if not isinstance(got, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {shown(got)}")
    return bool(got)


def check_key(key: Any) -> jax.Array:
    """Returns a random key, or raises ValueError."""
    shape, dtype = check_array("key", key)
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if shape != () if typed else (len(shape) != 1 or dtype != jnp.uint32):
        raise ValueError(f"key must be one key, jax.random.key(...), got {dtype} {shape}")
    return key


def check_choice(name: str, got: Any, choices: tuple) -> None:
    """Raises ValueError unless ``got`` is one of ``choices``, which are strings or None."""
    if not (got is None or isinstance(got, str)) or got not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {shown(got)}")


def check_instance(name: str, got: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raises ValueError unless ``got`` is of a class; ``wanted`` says what is, as an example."""
    if not isinstance(got, kind):
        raise ValueError(f"{name} must be {wanted}, got {shown(got)}")


def check_function(name: str, got: Any, of: str) -> None:
    """Raises ValueError unless it is None or a function of what ``of`` says."""
    if got is not None and not callable(got):
        raise ValueError(f"{name} must be a function of {of}, got {shown(got)}")


def check_path(name: str, got: Any) -> Path:
    """Returns a path, or raises ValueError."""
    if not isinstance(got, (str, os.PathLike)) or isinstance(os.fspath(got), bytes):
        raise ValueError(f"{name} must be a path, got {shown(got)}")
    return Path(got)


def check_dtype(name: str, got: Any, *, optional: bool = False) -> Any:
    """Returns a floating-point dtype, None where it is ``optional``, or raises ValueError."""
    if got is None and optional:
        return None
    dtype = as_dtype(name, got)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        raise ValueError(f"{name} must be a floating-point dtype of JAX, got {dtype.name}")
    return dtype


def as_dtype(name: str, got: Any) -> np.dtype:
    """Returns the dtype, or raises ValueError for anything else."""
    try:
        # To NumPy None is float64, and an array its own dtype.
        if got is not None and not isinstance(got, (np.generic, np.ndarray, jax.Array)):
            return jnp.dtype(got)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} must be a dtype such as 'float32' or 'bfloat16', got {shown(got)}")


def check_mapping(what: str, got: Mapping[str, T] | None) -> dict[str, T]:
    """Returns a dict of a mapping by name, empty for None, or raises ValueError."""
    if got is None:
        return {}
    if not isinstance(got, Mapping) or not all(isinstance(name, str) for name in got):
        raise ValueError(f"{what} must be a dict by name, got {shown(got)}")
    return dict(got)


def check_names(what: str, got: Mapping, wanted: Mapping, optional: tuple = ()) -> None:
    """Raises ValueError unless ``got`` has the names of ``wanted`` (those optional may lack)."""
    unknown = sorted(set(got) - set(wanted))
    missing = sorted(set(wanted) - set(got) - set(optional))
    if unknown or missing:
        raise ValueError(
            f"{what} must be {sorted(wanted) or 'empty'}"
            + (f"; missing: {missing}" if missing else "")
            + (f"; unknown: {unknown}" if unknown else "")
        )


def check_array(what: str, got: Any) -> tuple[tuple[int, ...], Any]:
    """Returns an array's shape and dtype, or raises ValueError for anything else."""
    if isinstance(got, (jax.Array, np.ndarray, np.generic)) or hasattr(got, "__jax_array__"):
        try:
            return jnp.shape(got), jnp.result_type(got)
        except TypeError:  # such as an array of objects
            pass
    raise ValueError(f"{what} must be a JAX or NumPy array, got {shown(got)}")


def check_shape(what: str, got: Any, wanted: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless ``got`` is a floating-point array of the wanted shape."""
    shape, dtype = check_array(what, got)
    if shape != wanted:
        raise ValueError(f"{what} must have shape ({axes}) = {wanted}, got {shape}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{what} must be floating point, got {dtype}")


def set_fields(config: Any, **values: Any) -> None:
    """Sets fields of a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


def check_fields(
    config: Any,
    *,
    sizes: tuple[str, ...] = (),
    numbers: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> None:
    """Checks fields of a frozen dataclass that is being made, and makes them Python's own.

    Args:
      config: the dataclass.
      sizes: names of integers of at least 1.
      numbers: names of finite numbers.
      flags: names of booleans.
      optional: those of them that may be None.

    Raises:
      ValueError: for a field of another kind.
    """
    checks = ((sizes, check_integer), (numbers, check_number), (flags, check_flag))
    for names, check in checks:
        for name in names:
            value = getattr(config, name)
            if value is not None or name not in optional:
                set_fields(config, **{name: check(name, value)})


def shown(got: Any) -> str:
    """What came, in at most 100 characters."""
    try:
        text = " ".join(repr(got).split())
    except Exception:  # of somebody else's class
        text = f"an object of {type(got).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def as_numpy(what: str, got: Any) -> np.ndarray:
    """Returns known values as a NumPy array, or raises ValueError if they do not form one."""
    try:
        return np.asarray(got)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be an array, got {shown(got)}") from error


def is_known(array: Any) -> bool:
    """Whether an array's values are at hand: not traced, nor on the devices of other processes."""
    if isinstance(array, jax.Array):
        return not isinstance(array, Tracer) and array.is_fully_addressable
    return True


def _plain(got: Any) -> Any:
    """A NumPy or JAX number as a Python number; None for booleans and anything else."""
    of_arrays = isinstance(got, (np.ndarray, np.generic, jax.Array)) and is_known(got)
    if of_arrays and got.ndim == 0 and jnp.issubdtype(got.dtype, jnp.number):
        got = got.item()
    return got if isinstance(got, (int, float)) and not isinstance(got, bool) else None
