"""How this process holds memory on a CPU. `PEFTCTL_ALLOCATOR=system` leaves everything as it is.

On Linux, glibc returns large blocks when a tensor is freed and takes fresh pages for the next one; the kernel has to
clear those pages again. On a CPU this costs training about half its speed. Two settings of the allocator, made inside
this process, keep what is freed.

oneDNN keeps what it has compiled for a shape, half a MiB each, and torch the description of that: 1,024 of both, which
rows of ever new lengths fill with half a GiB. Nothing but a step uses them again, and a step needs some dozens.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
"""Free memory at the top of the heap beyond which it is returned; number of blocks that get a mapping of their own."""


SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""For how many shapes oneDNN, and torch beside it, keep a kernel; read at their first product of matrices."""


def keep_memory() -> bool:
    """Make this process keep what it frees, for its next tensors; returns whether that was possible.

    Takes effect at once. Other allocators (jemalloc, tcmalloc) ignore it, and need it less. Kernels are kept for few
    shapes from here on, where the environment does not say for how many.
    """
    if os.environ.get("PEFTCTL_ALLOCATOR") == "system":
        return False
    for name, shapes in SHAPES.items():
        os.environ.setdefault(name, shapes)
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    never = 2**31 - 1  # the largest value that mallopt takes
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, never))
