"""How fast this device is: three figures, found in a second and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from peftctl.config.home import cache_home
from peftctl.planning.step import Step

SECONDS = 0.3
"""How long each figure is measured."""

WIDE, NARROW, TOKENS = 1536, 576, 2048


@dataclass(frozen=True)
class Speed:
    """What a device does in a second."""

    flops: float
    """Of products of matrices."""
    bytes: float
    """Read and written by what is no product."""
    calls: float
    """Operations that do next to nothing."""

    def seconds(self, step: Step) -> float:
        """How long a micro-batch takes."""
        return step.flops / self.flops + step.moved / self.bytes + step.calls / self.calls


def speed(device: torch.device, dtype: torch.dtype) -> Speed | None:
    """That of a device; None of one that is not here."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu{torch.get_num_threads()}"
    path = cache_home() / "speed" / f"{name}-{dtype}-{torch.__version__}.json".replace(" ", "_").replace("/", "_")
    try:
        return Speed(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        found = measured(device, dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found)), encoding="utf-8")
    except OSError:  # measured again the next time
        pass
    return found


def measured(device: torch.device, dtype: torch.dtype) -> Speed:
    """The figures as they are now."""
    x = torch.randn(TOKENS, NARROW, device=device).to(dtype)
    w = torch.randn(WIDE, NARROW, device=device).to(dtype)
    small = torch.zeros(8, device=device)
    products = rate(lambda: x @ w.T, device) * 2 * TOKENS * NARROW * WIDE
    moves = rate(lambda: x * x, device) * 3 * x.numel() * x.element_size()
    return Speed(products, moves, rate(lambda: small + small, device))


def rate(what: Callable[[], object], device: torch.device) -> float:
    """Times a second."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    what()
    wait()
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < SECONDS:
        for _ in range(8):
            what()
        wait()
        count += 8
    return count / spent
