"""4-bit and 8-bit weights with bitsandbytes: its import, its configuration, and its CPU traps."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from peftctl.errors import ModelError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_NOISE = {
    # imported on a CPU with AVX512_BF16: wishes for a kernel from the hub
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # 8 bit, every layer, every forward outside training: float16 is what its quantiser takes
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
}

_LINEAR4 = ("Linear4bit", "LinearNF4", "LinearFP4")


class _Without(logging.Filter):
    """Drops the records that begin with `start`."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.start)


def bitsandbytes() -> ModuleType:
    """The module, imported without a warning and without fetching anything.

    On import it asks the package `kernels`, where that is installed, for a kernel from the hub, and logs a warning
    where it is not. So `kernels` cannot be imported meanwhile; bitsandbytes then uses its own code.

    Raises:
        ModelError: bitsandbytes is not installed or does not load.
    """
    try:
        with without_downloads():
            return importlib.import_module("bitsandbytes")
    except Exception as error:  # a broken native library raises more than ImportError
        raise ModelError(
            f"model.quantization: bitsandbytes does not load: {type(error).__name__}: {error}",
            "reinstall bitsandbytes, or set `quantization: none`",
        ) from error


@contextmanager
def without_downloads() -> Iterator[None]:
    """For imports that may import bitsandbytes on their way, as transformers does where peft is installed."""
    for name, start in _NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(start))
    with _blocked("kernels"):
        yield


@contextmanager
def _blocked(name: str) -> Iterator[None]:
    """Inside, `import name` raises ImportError; a module already imported is put back afterwards."""
    hidden = {key: sys.modules[key] for key in sys.modules if key == name or key.startswith(name + ".")}
    for key in hidden:
        del sys.modules[key]
    sys.modules[name] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(hidden)


def config(
    quantization: str, *, double: bool, dtype: torch.dtype, device: torch.device, skip: list[str] | None = None
) -> BitsAndBytesConfig:
    """What transformers needs to quantise while it loads; the output head stays as it is (its default).

    Args:
        quantization: `nf4`, `fp4` or `int8`.
        double: 4 bit only: quantise the scales as well, which saves 0.37 bits a weight.
        dtype: of the computation; 4-bit weights are unpacked into it.
        device: where the weights will be.
        skip: patterns of the modules that stay as they are, instead of the output head.

    Raises:
        ModelError: not possible on this device, or bitsandbytes is not usable.
    """
    if device.type == "mps":
        raise ModelError(
            f"model.quantization: `{quantization}` does not work on Apple GPUs",
            "set `quantization: none`, or `device: cpu`",
        )
    bitsandbytes()
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def keep_layout(model: torch.nn.Module) -> None:
    """Stop 4-bit linears from repacking their weights in a forward without gradients.

    On a CPU with AVX512_BF16, bitsandbytes repacks a `Linear4bit` for inference when it runs in eval
    mode. That rounds the scales to bfloat16 for good, fails where widths are no multiples of 32 and 64, loses the
    gradient afterwards, and `dequantize_4bit` misreads the result. Training, evaluation, merging and checkpoints all
    need the weights as they were quantised.
    """
    for module in model.modules():
        if type(module).__name__ in _LINEAR4:
            linear: Any = module
            linear.support_avx512bf16_for_cpu = False


def misread_widths(model: torch.nn.Module, device: torch.device) -> str | None:
    """A warning where 4-bit weights are unpacked with wrong scales, else None.

    bitsandbytes' AVX-512 code (0.50) counts blocks of 64 weights by row, its quantiser over the whole matrix: where a
    width is a multiple of 16 and not of 64, rows take their neighbours' scales. All of training, evaluation and
    merging on that machine agree with each other; a GPU reads other weights.
    """
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    widths = {int(module.in_features) for module in model.modules() if type(module).__name__ in _LINEAR4}  # type: ignore[arg-type]
    odd = sorted(width for width in widths if width % 16 == 0 and width % 64)
    if not odd:
        return None
    return f"4-bit layers {odd[0]} wide, no multiple of 64, lose precision on this CPU; `quantization: int8` does not"
