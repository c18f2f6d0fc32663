"""Device and dtype are chosen by what the hardware does itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftctl.errors import ModelError
from peftctl.models import device as devices
from peftctl.models.device import choose_device, choose_dtype, native_bfloat16

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CUDA GPUs of the Turing generation, which has no bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_auto_takes_the_gpu_of_its_rank(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


def test_more_processes_than_gpus(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ModelError, match=r"process 3 of this machine needs a GPU of its own; there are 2"):
        choose_device("cuda")


def test_auto_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("mps") == torch.device("mps")


@pytest.mark.parametrize(
    ("wanted", "place", "capability", "dtype", "line"),
    [
        ("auto", "cuda", (9, 0), torch.bfloat16, "bfloat16 on cuda:0"),
        ("auto", "cuda", (8, 0), torch.bfloat16, "bfloat16 on cuda:0"),
        ("auto", "cuda", (7, 5), torch.float16, "float16 on cuda:0"),
        ("bfloat16", "cuda", (7, 5), torch.bfloat16, "bfloat16 on cuda:0 (emulated here, so slow)"),
        ("float32", "cuda", (7, 5), torch.float32, "float32 on cuda:0"),
        ("auto", "mps", None, torch.float32, "float32 on mps"),
        ("float16", "mps", None, torch.float16, "float16 on mps"),
    ],
)
def test_dtype_by_capability(
    wanted: str,
    place: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    line: str,
    gpus: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    said: list[str] = []
    assert choose_dtype(wanted, CUDA if place == "cuda" else torch.device(place), said.append) is dtype
    assert said == [line]


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_dtype_on_x86(avx512: bool, amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_dtype("auto", torch.device("cpu")) is dtype


@pytest.mark.parametrize(("features", "native"), [("fp asimd bf16 i8mm", True), ("fp asimd", False)])
def test_bfloat16_on_arm(features: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nFeatures : {features}\nCPU part : bf16\n")
    monkeypatch.setattr(devices.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(devices, "Path", lambda name: cpuinfo)
    assert native_bfloat16(torch.device("cpu")) is native
    cpuinfo.unlink()
    assert native_bfloat16(torch.device("cpu")) is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_real_gpu() -> None:
    device = choose_device("auto")
    x = torch.ones(8, 8, device=device, dtype=choose_dtype("auto", device))
    assert (x @ x).sum().item() == 512
