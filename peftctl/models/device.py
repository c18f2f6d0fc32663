"""The device and the dtype of a base model, chosen by what the hardware does natively, never by emulation."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from peftctl.errors import ModelError
from peftctl.models.quiet import Say, silent


def choose_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is one, else MPS, else the CPU; a CUDA device is the one of this process's local rank.

    Raises:
        ModelError: the device asked for is not here, or there are fewer GPUs than processes on this machine.
    """
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return _cuda()
    mps = torch.backends.mps.is_available()
    if wanted == "mps" and not mps:
        raise ModelError("model.device: no Apple GPU here", "set `device: auto` to take what there is")
    if wanted == "mps" or (wanted == "auto" and mps):
        return torch.device("mps")
    return torch.device("cpu")


def _cuda() -> torch.device:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        why = "no usable GPU here" if built else "this build of torch has no CUDA"
        raise ModelError(f"model.device: {why}", "set `device: auto` to take what there is")
    # set by torchrun and accelerate: the number of this process on its machine
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if rank >= count:
        raise ModelError(
            f"model.device: process {rank + 1} of this machine needs a GPU of its own; there are {count}",
            "start at most one process a GPU, or set `device: cpu`",
        )
    return torch.device("cuda", rank)


def choose_dtype(wanted: str, device: torch.device, say: Say = silent) -> torch.dtype:
    """The dtype of the weights and of the computation, told in one line (`bfloat16 on cpu`).

    `auto` is bfloat16 where the device computes it natively, whatever the checkpoint is stored in. Elsewhere it is
    float16 on CUDA, where memory is short, and float32 on the CPU and MPS, where float16 is slow or overflows.
    """
    native = native_bfloat16(device)
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        emulated = dtype is torch.bfloat16 and not native
        say(f"{wanted} on {device}" + (" (emulated here, so slow)" if emulated else ""))
        return dtype
    dtype = torch.bfloat16 if native else torch.float16 if device.type == "cuda" else torch.float32
    say(f"{str(dtype).removeprefix('torch.')} on {device}")
    return dtype


def native_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware.

    CUDA from compute capability 8.0 (Ampere) on, ROCm always; x86 with AVX512_BF16 or AMX, ARM with the bf16
    extension; not MPS, where only some chips do.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return _arm_bfloat16(Path("/proc/cpuinfo"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _arm_bfloat16(cpuinfo: Path) -> bool:
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    return any(line.startswith("Features") and "bf16" in line.split() for line in lines)
