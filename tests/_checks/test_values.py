"""Single values: what is taken as it is, what is made Python's own, and what is refused."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import memcache_jax as mc
from memcache_jax import _checks


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("number", [np.int64(8), np.uint8(8), np.array(8), jnp.int32(8)], ids=repr)
def test_integers_of_arrays_are_integers(number):
    assert type(_checks.check_integer("size", number)) is int
    pairs = [
        (mc.Constant(number), mc.Constant(8)),
        (mc.Logarithmic(number), mc.Logarithmic(8)),
        (mc.Lengths((number, 16)), mc.Lengths((8, 16))),
        (mc.SSC(top_k=number), mc.SSC(top_k=8)),
        (mc.memories.Titans(number, expansion=number), mc.memories.Titans(8, expansion=8)),
        (mc.nn.AttentionMixer(window=number), mc.nn.AttentionMixer(window=8)),
    ]
    shape: dict[str, Any] = dict(num_layers=8, features=8, mlp_features=8)
    made = mc.nn.LanguageModelConfig(number, number, number, number, mlp_features=number)
    pairs.append((made, mc.nn.LanguageModelConfig(8, num_heads=8, **shape)))
    for got, wanted in pairs:
        assert (got, hash(got), repr(got)) == (wanted, hash(wanted), repr(wanted))


@pytest.mark.parametrize("got", [True, np.bool_(True), 8.0, "8", None, [8], 1j, np.array([8])])
def test_what_is_no_integer(got):
    with pytest.raises(ValueError, match=r"size must be an integer, got .*(T|8|None|1j)"):
        _checks.check_integer("size", got)


def test_integers_have_limits():
    assert _checks.check_integer("size", None, optional=True) is None
    assert _checks.check_integer("size", 0, 0) == 0
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        _checks.check_integer("size", 0)
    with pytest.raises(ValueError, match="size must be at most 2147483647, got 2147483648"):
        _checks.check_integer("size", 2**31)


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32, ml_dtypes.bfloat16])
def test_numbers_of_arrays_are_numbers(kind):
    number = kind(0.5)
    assert type(_checks.check_number("rate", number)) is float
    assert _checks.check_number("rate", number) == 0.5


@pytest.mark.parametrize("got", [math.nan, math.inf, np.float32("nan"), True, None, "1", [1.0], -1])
def test_what_is_no_good_number(got):
    with pytest.raises(ValueError, match=r"rate must be finite and >= 0, got "):
        _checks.check_number("rate", got, "finite and >= 0", lambda x: x >= 0)


def test_dtypes():
    for got in ("bfloat16", jnp.float32, np.dtype("float16"), float):
        assert _checks.check_dtype("dtype", got) == jnp.dtype(got)
    for got in (None, "int4096", "int32", np.float32(1), np.ones(2), np.longdouble, 3):
        with pytest.raises(ValueError, match="dtype must be a "):
            _checks.check_dtype("dtype", got)


def test_paths_and_functions():
    assert _checks.check_path("workdir", "a/b") == _checks.check_path("workdir", Path("a/b"))
    for got in (None, 3, b"a/b", ["a"]):
        with pytest.raises(ValueError, match="workdir must be a path, got "):
            _checks.check_path("workdir", got)
    _checks.check_function("text_of", None, "token ids")
    _checks.check_function("text_of", str, "token ids")
    with pytest.raises(ValueError, match="text_of must be a function of token ids, got 'utf-8'"):
        _checks.check_function("text_of", "utf-8", "token ids")


def test_what_came_is_shown_in_one_short_line():
    class Broken:
        def __repr__(self):
            raise RuntimeError("no repr")

    assert _checks.shown(np.ones((2, 1))) == "array([[1.], [1.]])"
    assert _checks.shown("x" * 1000).endswith("x...")
    assert len(_checks.shown("x" * 1000)) == 100
    assert _checks.shown(Broken()) == "an object of Broken"
