"""One run of one arm on a GPU: what it is, and the model that all arms have."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.job import Clock
from benchmarks.prepare import WORK

SHAPES: dict[str, dict[str, int]] = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "65B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
}
WARM, TIMED, ROUNDS = 2, 5, 3
DEVICE = "cuda"


@dataclass(frozen=True)
class Case:
    """One run of one arm."""

    arm: str
    """peftctl | peft + TRL | Unsloth"""
    shape: str
    quantised: bool
    r: int
    length: int
    result: str = ""

    @property
    def title(self) -> str:
        return f"Llama-{self.shape}, {'QLoRA' if self.quantised else 'LoRA'} r={self.r}, 1 x {self.length}"


def folder(shape: str) -> str:
    """A folder with the configuration alone."""
    from transformers import LlamaConfig

    path = WORK / f"llama-{shape}"
    LlamaConfig(vocab_size=32000, max_position_embeddings=8192, **SHAPES[shape]).save_pretrained(path)
    return str(path)


def tick(clock: Clock, loss: float, tokens: int) -> None:
    import torch

    torch.cuda.synchronize()
    clock.step(loss, tokens)
