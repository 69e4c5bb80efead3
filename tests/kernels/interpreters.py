"""Running on a CPU the kernels of every implementation."""

import contextlib

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from memcache_jax.kernels._dispatch import interpret_kernels
from tests.cases import assert_close, value_and_vjp

KERNELS = ("pallas_tpu", "pallas_gpu")


@contextlib.contextmanager
def runnable(implementation):
    """Traces an implementation so that this machine runs it."""
    kernels = implementation.startswith("pallas")
    with interpret_kernels() if kernels else contextlib.nullcontext():
        yield


def compare_to_reference(operation, implementation, *arguments, tolerance, wanted_dtype=None):
    """Compares ``operation(*arguments, implementation=...)`` and its VJP with the reference's.

    Args:
      operation: the operation.
      implementation: the one to test.
      *arguments: arrays.
      tolerance: of values, and half of that of gradients.
      wanted_dtype: of the reference's arguments, if it is not theirs.
    """
    with runnable(implementation):
        got = value_and_vjp(lambda *xs: operation(*xs, implementation=implementation), *arguments)
    wide = jax.tree.map(lambda x: x.astype(wanted_dtype or x.dtype), arguments)
    wanted = value_and_vjp(lambda *xs: operation(*xs, implementation="reference"), *wide)
    dtypes = jax.tree.map(lambda x: x.dtype, (got[1], arguments))
    assert dtypes[0] == dtypes[1]
    assert_close(got[0], wanted[0], tolerance)
    assert_close(got[1], wanted[1], 2 * tolerance)


def finds_races(function, *arguments):
    """Whether a simulated TPU of two cores finds one, or a block visited anew after others."""
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with interpret_kernels(), pltpu.force_tpu_interpret_mode(params):
        try:
            jax.block_until_ready(function(*arguments))
        except jax.errors.JaxRuntimeError as error:
            # Newer versions of JAX raise where a race is found.
            if "Revisited block" not in str(error) and "RACE DETECTED" not in str(error):
                raise
            return True
    assert interpret_pallas_call.races is not None
    return interpret_pallas_call.races.races_found


def all_parallel(tpu_call):
    """``tpu_call`` with an error: all axes of a grid declared to be parallel."""

    def call(*args, dimension_semantics, **options):
        return tpu_call(
            *args, dimension_semantics=["parallel"] * len(dimension_semantics), **options
        )

    return call
