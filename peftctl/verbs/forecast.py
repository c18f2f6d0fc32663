"""What `train` foresees of its memory, before it loads anything, and what came of it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from peftctl.errors import OutOfMemory
from peftctl.models.quiet import Say, reason
from peftctl.planning import workload
from peftctl.planning.estimate import Estimate, estimate
from peftctl.recipe import Recipe
from peftctl.verbs.hints import smaller
from peftctl.verbs.rows import Rows

SURE = 0.85
"""Share of an estimate that a run needs at least."""


def forecast(recipe: Recipe, rows: Rows, say: Say) -> Estimate | None:
    """What the run needs; None where that cannot be told, which `say` hears of.

    Raises OutOfMemory when it cannot fit the memory that is free.
    """
    try:
        load = workload.of_rows(recipe.trainer, rows.task, rows.train, recipe.seed)
        found = estimate(recipe, load.task, load.batch)
    except Exception as error:  # foreign models do what they like without content: they are trained all the same
        say(f"memory is not predicted: {reason(error)}")
        return None
    free = available(found.device)
    if free is not None and SURE * found.peak > free:
        text = f"does not fit: about {found.peak / 2**30:.1f} GiB needed, {free / 2**30:.1f} free on {found.device}"
        raise OutOfMemory(text, f"{smaller(recipe)}; `peftctl plan` says more")
    return found


def available(device: torch.device) -> int | None:
    """Bytes that can still be had, those that this process has already included; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split()[1:]}
        own = int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return sizes["MemAvailable"] + sizes.get("SwapFree", 0) + own
    except (OSError, ValueError, KeyError, IndexError):  # not Linux
        return None


def compared(measured: int, found: Estimate | None) -> str:
    """`2.31 GiB, predicted 2.40 (+4 %)`."""
    text = f"{measured / 2**30:.2f} GiB"
    if found is None:
        return f"{text} at most"
    return f"{text}, predicted {found.peak / 2**30:.2f} ({100 * (found.peak / measured - 1):+.0f} %)"
