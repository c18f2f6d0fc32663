"""How much memory a run has needed so far."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> int:
    """Most bytes held at once since the start: on the CUDA device when there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
