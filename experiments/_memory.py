"""What a compiled program needs of a device's memory, and what a process keeps of its own."""

import ctypes
import sys
from typing import Any


def memory_of(compiled: Any) -> dict[str, int]:
    """Returns the bytes of a program's arguments, its temporaries and both at the peak.

    XLA's temporaries leave out what lies in a TPU's VMEM, and its own peak has that, but counts
    only what is alive at once; a runtime allocates all of a program's memory when it begins. The
    peak here is the larger of the two, and at most too large by a chip's VMEM.
    """
    memory = compiled.memory_analysis()
    # An output that takes an argument's place needs none of its own.
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    allocated = memory.argument_size_in_bytes + memory.temp_size_in_bytes + own
    return dict(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=max(allocated, memory.peak_memory_in_bytes),
    )


def keep_freed_memory() -> bool:
    """Makes glibc keep all freed memory; returns whether that worked."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    return mallopt is not None and bool(mallopt(m_trim_threshold, 2**30) * mallopt(m_mmap_max, 0))
