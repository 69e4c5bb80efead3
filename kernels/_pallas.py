"""What the Pallas kernels share: how they are called, and how shapes are filled up."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu_triton
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from memcache_jax._typing import Array, Matrices
from memcache_jax.kernels._dispatch import check_served

_INTERPRETED = contextvars.ContextVar("kernels_interpreted", default=False)
_SCOPED_VMEM = 16 * 2**20  # what a TPU kernel may use unless it asks for more
_VMEM = 60 * 2**20  # what it may ask for: the smallest TPUs have 64
_SMEM = 2**20 - 2**14  # a TPU's scalar memory, less what kernels take for themselves
_SHARED_MEMORY = 227 * 2**10  # of a Triton program on an H100, H200 or B200
_LARGEST_STATE = 2**15  # numbers that a Triton program has registers for, some of them spilled
_COMFORTABLE_STATE = 2**14  # the same of one matrix, with hardly a spill
LANES = 128
"""Lanes of a TPU's vector register."""


@contextlib.contextmanager
def interpret_kernels() -> Iterator[None]:
    """Traces kernels, Triton's and TPUs' alike, to run on the CPU, for tests of their numbers.

    ``pltpu.force_tpu_interpret_mode`` simulates a TPU's memories too, and takes much longer.
    """
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def lowered_for_gpu(jitted: Any, *arguments: Any) -> jax.stages.Lowered:
    """A jitted function lowered for an NVIDIA GPU, which need not be here."""
    # From JAX 0.11 on Triton's lowering asks for which one.
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jitted.trace(*arguments).lower(lowering_platforms=("cuda",))


def for_each(count: int, body: Callable[[Any, Any], Any], first: Any) -> Any:
    """``lax.fori_loop`` from 0, whose index is an int32 where JAX's integers have 64 bits too."""

    def of_int32(i: Any, x: Any) -> Any:
        return body(lax.convert_element_type(i, jnp.int32), x)

    return lax.fori_loop(0, count, of_int32, first)


def triton_call(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int = 2, **options: Any
) -> Callable[..., Any]:
    """``pl.pallas_call`` for Triton.

    Raises:
      ValueError: for a number of warps that is no power of two, at which Triton ends the process.
    """
    if num_warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16, got {num_warps}")
    return pl.pallas_call(
        kernel,
        compiler_params=plgpu_triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=_INTERPRETED.get(),
        **options,
    )


def triton_barrier() -> None:
    """Has the threads of a Triton program wait for each other, and see what each has stored."""
    if not _INTERPRETED.get():
        plgpu_triton.debug_barrier()


@dataclasses.dataclass(frozen=True)
class TritonSizes:
    """How a Triton program runs.

    Attributes:
      rows: rows that it takes at once, at most, a power of two from 16 on.
      num_warps: its warps.
      num_stages: loads in flight.
    """

    rows: int
    num_warps: int
    num_stages: int

    def call(
        self, name: str, kernel: Callable[..., None], grid: tuple[int, ...], out_shape: Any
    ) -> Callable[..., Any]:
        """``triton_call`` of a kernel that runs so."""
        return triton_call(
            kernel,
            name=name,
            grid=grid,
            out_shape=out_shape,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


def tpu_call(
    kernel: Callable[..., None],
    *,
    dimension_semantics: Sequence[Literal["parallel", "arbitrary"]],
    vmem_bytes: int = 0,
    **options: Any,
) -> Callable[..., Any]:
    """``pl.pallas_call`` for a TPU.

    Args:
      kernel: the kernel.
      dimension_semantics: of each axis of the grid, ``"parallel"`` or ``"arbitrary"``.
      vmem_bytes: an estimate of the vector memory that blocks and temporaries need.
      **options: as for ``pl.pallas_call``.
    """
    limit = min(max(vmem_bytes, _SCOPED_VMEM), _VMEM)
    return pl.pallas_call(
        kernel,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(dimension_semantics), vmem_limit_bytes=limit
        ),
        interpret=_INTERPRETED.get(),
        **options,
    )


def vmem_reason(*needs: tuple[str, int]) -> tuple[bool, str]:
    """Why a TPU's vector memory may not do, for ``check_served``.

    Args:
      *needs: passes and an estimate of the bytes that each needs.
    """
    told = " and ".join(f"{of} {needed / 2**20:.1f} MiB" for of, needed in needs)
    over = any(needed > _VMEM for _, needed in needs)
    return over, f"vector memory: {told}, where kernels may use {_VMEM / 2**20:.0f} MiB"


def vmem_left(needed: int) -> int:
    """Bytes of vector memory that a TPU's kernel may use beside an estimate of what it needs."""
    return max(_VMEM - needed, 0)


def smem_reason(numbers: int) -> tuple[bool, str]:
    """Why a TPU's scalar memory may not do for lists of so many int32, for ``check_served``."""
    told = f"scalar memory: lists of {numbers} numbers, where {_SMEM // 4} fit"
    return 4 * numbers > _SMEM, told


def shared_memory_reason(needed: int) -> tuple[bool, str]:
    """Why a GPU's shared memory may not do for one program, for ``check_served``."""
    told = f"shared memory: a program needs {needed / 2**10:.0f} KiB"
    return needed > _SHARED_MEMORY, f"{told}, where there are {_SHARED_MEMORY // 2**10}"


def with_most_stages(operation: str, blocks: Any, shared_bytes: Callable[[Any], int]) -> Any:
    """Returns the blocks with as many loads in flight as shared memory has room for.

    Args:
      operation: whose they are.
      blocks: block sizes, a dataclass; of ``num_stages``, the most there may be.
      shared_bytes: an estimate of what a program needs with such blocks.

    Raises:
      CannotServeError: if there is no room for one.
    """
    every = [
        dataclasses.replace(blocks, num_stages=stages) for stages in range(1, blocks.num_stages + 1)
    ]
    reasons = {blocks: shared_memory_reason(shared_bytes(blocks)) for blocks in every}
    check_served(operation, "pallas_gpu", [reasons[every[0]]])
    return next(blocks for blocks in reversed(every) if not reasons[blocks][0])


def tile_bytes(shape: Sequence[int], itemsize: int = 4) -> int:
    """Bytes of a matrix in a TPU's memory, which holds it in tiles of 8 x 128."""
    rows, columns = shape
    return -(-rows // 8) * 8 * -(-columns // LANES) * LANES * itemsize


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two from ``size`` and ``least`` on."""
    return 1 << (max(size, least) - 1).bit_length()


def filled_up(x: Array, shape: Sequence[int]) -> Array:
    """Returns ``x`` with zeros at the ends of its last axes, so that they have this shape."""
    lead = x.ndim - len(shape)
    ends = [(0, 0)] * lead + [
        (0, to - size) for to, size in zip(shape, x.shape[lead:], strict=True)
    ]
    return jnp.pad(x, ends) if any(end for _, end in ends) else x


def cut(x: Array, like: Array) -> Array:
    """Returns what of a filled up array is of the shape of another one, in its dtype."""
    return x[tuple(slice(size) for size in like.shape)].astype(like.dtype)


def dtype_reasons(*arrays: Array) -> list[tuple[bool, str]]:
    """Why kernels cannot serve arrays of these dtypes, for ``check_served``."""
    names = sorted({x.dtype.name for x in arrays})
    return [(not {*names} <= {"bfloat16", "float32"}, f"dtypes {names}, not bfloat16 or float32")]


def triton_state_reasons(bank: Matrices) -> list[tuple[bool, str]]:
    """Why Triton kernels cannot serve states (..., in, out), for ``check_served``."""
    shapes = [m.shape[-2:] for m in bank]
    return [
        (any(1 in shape for shape in shapes), f"matrices of one row or column, {shapes}"),
        (
            _filled(shapes) > _LARGEST_STATE,
            f"a state of {_filled(shapes)} numbers, filled up, where {_LARGEST_STATE} fit into "
            "registers",
        ),
    ]


def fits_triton(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a Triton program keeps matrices of these shapes, and reads of them, in registers."""
    # Each layer has rows of its own there too, so that two have room for half as much.
    return len(shapes) * _filled(shapes) <= _COMFORTABLE_STATE


def _filled(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(math.prod(map(power_of_two, shape)) for shape in shapes)


def read_shape(
    read: Callable[..., Array], bank: Matrices, query: Array, lead: int = 2
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what a block's rows read from one state, ``lead`` axes before states."""
    matrices = tuple(jax.ShapeDtypeStruct(m.shape[lead + 1 :], m.dtype) for m in bank)
    return jax.eval_shape(read, matrices, jax.ShapeDtypeStruct(query.shape[-2:], query.dtype))


def shape_key(bank: Matrices, rows: int) -> str:
    """What block sizes are measured for: states, rows of a block, the shapes of a state."""
    shapes = "+".join(f"{m.shape[-2]}x{m.shape[-1]}" for m in bank)
    return f"n{bank[0].shape[-3]} c{rows} {shapes}"
