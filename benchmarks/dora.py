"""How fast DoRA trains beside LoRA, and beside HF PEFT's DoRA: forward and backward of a small Llama, no update.

    OMP_NUM_THREADS=2 python benchmarks/dora.py --rounds 20

The models take turns within every round, and each round gives one ratio to LoRA, so that what else the machine does
falls on all of them alike. CPU time is that of all threads together; it hardly notices other processes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl

RANK, ROWS, LENGTH, VOCABULARY = 8, 4, 256, 512
SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "wide": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""Two layers of each; `wide` is TinyLlama-1.1B's with twice its key and value heads."""


class Took(NamedTuple):
    """Seconds that one step took."""

    wall: float
    cpu: float


def base(shape: str) -> nn.Module:
    torch.manual_seed(0)
    config: Any = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **SHAPES[shape])
    return LlamaForCausalLM(config).bfloat16()


def ours(shape: str, method: str) -> nn.Module:
    return peftctl.attach(base(shape), peftctl.METHODS[method](r=RANK, alpha=2 * RANK)).train()


def theirs(shape: str, use_dora: bool) -> nn.Module:
    targets = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    options = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=use_dora, **targets)
    return peft.get_peft_model(base(shape), options).train()


KINDS: dict[str, Callable[[str], nn.Module]] = {
    "LoRA": lambda shape: ours(shape, "lora"),
    "DoRA": lambda shape: ours(shape, "dora"),
    "PEFT LoRA": lambda shape: theirs(shape, use_dora=False),
    "PEFT DoRA": lambda shape: theirs(shape, use_dora=True),
}


def step(model: nn.Module, ids: Tensor) -> Took:
    wall, cpu = time.perf_counter(), time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    took = Took(time.perf_counter() - wall, time.process_time() - cpu)
    model.zero_grad(set_to_none=True)
    return took


def told(times: list[float], lora: list[float]) -> str:
    """Median [ms], and the speed as a share of LoRA's: median (quartiles) of the rounds."""
    low, middle, high = statistics.quantiles([b / a for a, b in zip(times, lora, strict=True)], n=4)
    return f"{statistics.median(times) * 1e3:.0f} | {middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--shape", choices=SHAPES, action="append", help="both when left out")
    given = options.parse_args()
    rounds, shapes = given.rounds, given.shape or list(SHAPES)
    print(f"torch {torch.__version__}, peft {peft.__version__}, {torch.get_num_threads()} threads; {rounds} rounds of")
    print(f"{ROWS} x {LENGTH} tokens; bfloat16 base, all-linear, r={RANK}, no dropout; speeds relative to our LoRA\n")
    print("| shape | method | wall, ms | speed by wall | CPU, ms | speed by CPU |")
    print("|---|---|---|---|---|---|")
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    for shape in shapes:
        models = {kind: make(shape) for kind, make in KINDS.items()}
        took: dict[str, list[Took]] = {kind: [] for kind in models}
        for model in models.values():
            step(model, ids)  # the first one allocates
        for _ in range(rounds):
            for kind, model in models.items():
                took[kind].append(step(model, ids))
        for kind, times in took.items():
            walls, cpus = zip(*times, strict=True)
            lora_walls, lora_cpus = zip(*took["LoRA"], strict=True)
            print(f"| {shape} | {kind} | {told(walls, lora_walls)} | {told(cpus, lora_cpus)} |", flush=True)


if __name__ == "__main__":
    main()
