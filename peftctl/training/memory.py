"""How much memory a run has needed so far."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Most bytes held at once since the start: on the CUDA device when there is one, else resident in RAM."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else most_resident()


def most_resident() -> int:
    """Most bytes of this program that were in RAM at once.

    Linux is asked for VmHWM: `ru_maxrss` survives `exec`, so under a large parent it is the parent's.
    """
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
