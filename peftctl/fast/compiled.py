"""`kernels.cpp`, compiled for this machine when it is first needed and kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftctl.config.home import cache_home
from peftctl.fast.plain import Activation, Plain

SOURCE = Path(__file__).with_name("kernels.cpp")

COMPILE = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-fPIC", "-std=c++17")
"""Linking is a step of its own, without these: `-ffast-math` there would switch off denormal numbers for the process,
and `-fopenmp` would bring a second thread pool beside torch's."""

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Compiled(Plain):
    """The same functions as `Plain`, of contiguous tensors on the CPU in one dtype."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def norm(self, x: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y, inverse = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
        self.call("norm", x, weight, y, inverse, *x.shape, eps, shift)
        return y, inverse

    def norm_backward(  # type: ignore[override]
        self, dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, shift: float, residual: Tensor | None
    ) -> Tensor:
        dx = torch.empty_like(x)
        self.call("norm_backward", dy, x, weight, inverse, residual, dx, *x.shape, shift)
        return dx

    def gate(self, g: Tensor, u: Tensor, activation: Activation) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(g)
        self.call("gate", g, u, out, g.numel(), KINDS[activation])
        return out

    def gate_backward_(self, da: Tensor, g: Tensor, u: Tensor, activation: Activation) -> None:  # type: ignore[override]
        self.call("gate_backward", da, g, u, g.numel(), KINDS[activation])

    def arrange(  # type: ignore[override]
        self, x: Tensor, index: Tensor, turn: tuple[Tensor, Tensor] | None, scale: float = 1.0
    ) -> Tensor:
        n, length = index.shape
        out = x.new_empty(n, x.shape[1], length, x.shape[2])
        self.call("arrange", x, index, *(turn or (None, None)), out, n, x.shape[1], length, x.shape[2], scale)
        return out

    def restore_(  # type: ignore[override]
        self, out: Tensor, rows: Tensor, index: Tensor, turn: tuple[Tensor, Tensor] | None, scale: float = 1.0
    ) -> None:
        n, heads, length, width = rows.shape
        self.call("restore", rows, index, *(turn or (None, None)), out, n, heads, length, width, scale)

    def attend_(self, p: Tensor, queries: int, offset: int, window: int) -> None:  # type: ignore[override]
        self.call("attend", p, *p.shape, queries, offset, window)

    def attend_backward_(self, d: Tensor, p: Tensor, queries: int, offset: int, window: int) -> None:  # type: ignore[override]
        self.call("attend_backward", d, p, *p.shape, queries, offset, window)

    def soften(self, logits: Tensor, labels: Tensor, cap: float | None, residual: bool) -> Tensor:
        logps = logits.new_empty(len(logits), dtype=torch.float32)
        self.call("soften", logits, labels, logps, *logits.shape, cap or 0.0, int(residual))
        return logps

    def call(self, name: str, first: Tensor, *others: Tensor | int | float | None) -> None:
        """The kernel for the dtype of `first`."""
        assert all(one.is_contiguous() for one in (first, *others) if isinstance(one, Tensor)), name
        function = getattr(self.library, f"{name}_{DTYPES[first.dtype]}")
        function(*map(passed, (first, *others)))


KINDS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
"""As `kernels.cpp` counts them."""


def passed(value: Tensor | int | float | None) -> Any:
    """An argument as C takes it."""
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


def wanted() -> bool:
    """Whether they are to be compiled: not where `PEFTCTL_FAST_KERNELS` is `off`."""
    return os.environ.get("PEFTCTL_FAST_KERNELS") != "off"


@lru_cache(maxsize=1)
def available() -> Compiled | None:
    """The kernels; None where there is no compiler that makes them, or they are not wanted."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None or not wanted():
        return None
    try:
        return Compiled(ctypes.CDLL(str(library(compiler))))
    except (OSError, subprocess.SubprocessError):  # no such flags, no room, no OpenMP in torch: slower, not wrong
        return None


def library(compiler: str) -> Path:
    """The file, made if need be. Raises OSError and SubprocessError."""
    made_of = [SOURCE.read_text(), compiler, *COMPILE, processor()]
    name = f"kernels-{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:16]}.so"
    kept = cache_home() / "kernels" / name
    if kept.is_file():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        half, whole = Path(folder, "kernels.o"), Path(folder, name)
        for command in ([*COMPILE, "-c", str(SOURCE), "-o", str(half)], ["-shared", str(half), "-o", str(whole)]):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=120)
        whole.replace(kept)
    return kept


def processor() -> str:
    """What `-march=native` stands for: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
