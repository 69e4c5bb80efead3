"""What the TPU kernels share: how they are called, and how much memory a chip has."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memcache_jax.kernels._dispatch import interpreted
from memcache_jax.kernels._platform import only_on_its_platform

_SCOPED_VMEM = 16 * 2**20  # what a TPU kernel may use unless it asks for more
_VMEM = 60 * 2**20  # what it may ask for: the smallest TPUs have 64
_SMEM = 2**20 - 2**14  # a TPU's scalar memory, less what kernels take for themselves
_PRECISIONS = (None, "default", "fastest", "bfloat16", "highest", "float32")
LANES = 128
"""Lanes of a TPU's vector register."""


def tpu_call(
    kernel: Callable[..., None],
    *,
    dimension_semantics: Sequence[Literal["parallel", "arbitrary"]],
    vmem_bytes: int = 0,
    **options: Any,
) -> Callable[..., Any]:
    """``pl.pallas_call`` for a TPU.

    The compiler of kernels has products in one pass of bfloat16 and in float32. Where
    ``jax.default_matmul_precision`` asks for anything else, such as ``"high"``, it is float32.

    Args:
      kernel: the kernel.
      dimension_semantics: ``"parallel"`` or ``"arbitrary"`` for each axis of the grid.
      vmem_bytes: an estimate of the vector memory that blocks and temporaries need.
      **options: as for ``pl.pallas_call``.
    """
    limit = min(max(vmem_bytes, _SCOPED_VMEM), _VMEM)
    run = pl.pallas_call(
        kernel,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(dimension_semantics), vmem_limit_bytes=limit
        ),
        interpret=interpreted(),
        **options,
    )

    def call(*args: Any) -> Any:
        config: Any = jax.config
        wanted = config.jax_default_matmul_precision
        with jax.default_matmul_precision(wanted if wanted in _PRECISIONS else "highest"):
            return run(*args)

    return only_on_its_platform("pallas_tpu", call)


def vmem_reason(*needs: tuple[str, int]) -> tuple[bool, str]:
    """Refuses passes that need more vector memory than a TPU has, for ``check_served``.

    Args:
      *needs: the name of each pass and an estimate of the bytes that it needs.
    """
    told = " and ".join(f"{of} {needed / 2**20:.1f} MiB" for of, needed in needs)
    over = any(needed > _VMEM for _, needed in needs)
    return over, f"vector memory: {told}, where kernels may use {_VMEM / 2**20:.0f} MiB"


def vmem_left(needed: int) -> int:
    """Bytes of vector memory that are left to a kernel that needs so many."""
    return max(_VMEM - needed, 0)


def smem_reason(numbers: int) -> tuple[bool, str]:
    """Refuses lists of more int32 than a TPU's scalar memory holds, for ``check_served``."""
    told = f"scalar memory: lists of {numbers} numbers, where {_SMEM // 4} fit"
    return 4 * numbers > _SMEM, told


def tile_bytes(shape: Sequence[int], itemsize: int = 4) -> int:
    """Bytes of a matrix in a TPU's memory, which holds it in tiles of 8 x 128."""
    rows, columns = shape
    return -(-rows // 8) * 8 * -(-columns // LANES) * LANES * itemsize
