"""What the Triton kernels share: how they are called, and how much memory a program has."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from memcache_jax._typing import Matrices
from memcache_jax.kernels._dispatch import check_served, interpreted
from memcache_jax.kernels._platform import only_on_its_platform
from memcache_jax.kernels._shapes import padded_size

try:
    from jax.experimental.pallas.triton import CompilerParams, debug_barrier
except ImportError as error:
    raise ImportError(
        f"JAX {jax.__version__} has no Pallas Triton backend, which JAX 0.12 deprecated ({error})"
    ) from error

_LARGEST_STATE = 2**15  # numbers that a Triton program has registers for, if it may spill some
_SHARED_MEMORY = 227 * 2**10  # of a Triton program on an H100, H200 or B200


def triton_call(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int = 2, **options: Any
) -> Callable[..., Any]:
    """``pl.pallas_call`` for Triton.

    Raises:
      ValueError: for a number of warps that is no power of two, which makes Triton end the process.
    """
    if num_warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16, got {num_warps}")
    call = pl.pallas_call(
        kernel,
        compiler_params=CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpreted(),
        **options,
    )
    return only_on_its_platform("pallas_gpu", call)


def triton_barrier() -> None:
    """Makes the threads of a Triton program wait for each other and see each other's stores."""
    if not interpreted():
        debug_barrier()


@dataclasses.dataclass(frozen=True)
class TritonSizes:
    """How a Triton program runs.

    Attributes:
      rows: the most rows that it takes at once, a power of two from 16 on.
      num_warps: its warps.
      num_stages: loads in flight.
    """

    rows: int
    num_warps: int
    num_stages: int

    def call(
        self, name: str, kernel: Callable[..., None], grid: tuple[int, ...], out_shape: Any
    ) -> Callable[..., Any]:
        """``triton_call`` of a kernel with these sizes."""
        return triton_call(
            kernel,
            name=name,
            grid=grid,
            out_shape=out_shape,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


def for_each(count: int, body: Callable[[Any, Any], Any], first: Any) -> Any:
    """``lax.fori_loop`` from 0 whose index is an int32, even where JAX's integers have 64 bits."""

    def of_int32(i: Any, x: Any) -> Any:
        return body(lax.convert_element_type(i, jnp.int32), x)

    return lax.fori_loop(0, count, of_int32, first)


def triton_state_reasons(bank: Matrices) -> list[tuple[bool, str]]:
    """Refuses states (..., in, out) that Triton kernels cannot hold, for ``check_served``."""
    shapes = [m.shape[-2:] for m in bank]
    size = padded_size(shapes)
    return [
        (any(1 in shape for shape in shapes), f"matrices of one row or column, {shapes}"),
        (
            size > _LARGEST_STATE,
            f"a state of {size} numbers, padded, where registers hold {_LARGEST_STATE}",
        ),
    ]


def with_most_stages(operation: str, blocks: Any, shared_bytes: Callable[[Any], int]) -> Any:
    """Returns the block sizes with as many loads in flight as fit into shared memory.

    Args:
      operation: the operation's name.
      blocks: block sizes, a dataclass whose ``num_stages`` is the most to try.
      shared_bytes: estimates what a program needs with given block sizes.

    Raises:
      CannotServeError: if not even one load fits.
    """
    every = [
        dataclasses.replace(blocks, num_stages=stages) for stages in range(1, blocks.num_stages + 1)
    ]
    reasons = {blocks: _shared_memory_reason(shared_bytes(blocks)) for blocks in every}
    check_served(operation, "pallas_gpu", [reasons[every[0]]])
    return next(blocks for blocks in reversed(every) if not reasons[blocks][0])


def lowered_for_gpu(jitted: Any, *arguments: Any) -> jax.stages.Lowered:
    """Lowers a jitted function for an NVIDIA GPU, which this machine need not have."""
    # From JAX 0.11 on Triton's lowering asks for the kind of GPU.
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jitted.trace(*arguments).lower(lowering_platforms=("cuda",))


def _shared_memory_reason(needed: int) -> tuple[bool, str]:
    told = f"shared memory: a program needs {needed / 2**10:.0f} KiB"
    return needed > _SHARED_MEMORY, f"{told}, where there are {_SHARED_MEMORY // 2**10}"
