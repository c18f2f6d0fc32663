"""Keep freed memory instead of handing it back to the system each step.

On Linux, glibc returns large blocks when a tensor is freed and takes fresh pages for the next one; the kernel has to
clear those pages again. On a CPU this costs training about half its speed. Two settings of the allocator, made inside
this process, avoid it. `PEFTCTL_ALLOCATOR=system` leaves everything as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
"""Free memory at the top of the heap beyond which it is returned; number of blocks that get a mapping of their own."""


def keep_memory() -> bool:
    """Make this process keep what it frees, for its next tensors; returns whether that was possible.

    Takes effect at once. Other allocators (jemalloc, tcmalloc) ignore it, and need it less.
    """
    if sys.platform != "linux" or os.environ.get("PEFTCTL_ALLOCATOR") == "system":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    never = 2**31 - 1  # the largest value that mallopt takes
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, never))
