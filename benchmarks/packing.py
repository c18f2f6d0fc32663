"""How fast packed rows train beside padded ones, grouped by length: forward and backward of whole steps, no update.

    OMP_NUM_THREADS=1 python benchmarks/packing.py --rounds 3

Both layouts take turns on the same steps, and each step gives one ratio. CPU time is that of all threads together; it
hardly notices other processes. `--memory` runs each layout in a process of its own and compares their peaks.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.data.batches import Layout, order
from peftctl.data.encode import Encoded
from peftctl.tasks import sft
from peftctl.training.memory import peak_memory
from peftctl.training.packing import work

VOCABULARY = 49152
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
"""SmolLM2-135M's; it has thirty layers."""

DRAWS: dict[str, Callable[[random.Random], int]] = {
    "tweets": lambda draw: round(min(max(draw.gauss(75, 8), 50), 110)),
    "chats": lambda draw: round(min(max(draw.lognormvariate(5.0, 1.0), 16), 1024)),
    "even": lambda draw: draw.randint(16, 512),
    "outliers": lambda draw: 1024 if draw.random() < 0.03 else draw.randint(20, 60),
}
"""Lengths of rows [tokens]: nearly equal; long-tailed; any alike; short ones and a few very long."""


def rows(kind: str, number: int) -> list[Encoded]:
    """Rows whose second half is trained."""
    draw = random.Random(kind)
    lengths = [DRAWS[kind](draw) for _ in range(number)]
    return [Encoded(array("i", [draw.randrange(VOCABULARY) for _ in range(n)]), ((n // 2, n),)) for n in lengths]


def model(attention: str, dtype: str, layers: int) -> nn.Module:
    torch.manual_seed(0)
    config: Any = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=4096, **SHAPE)
    config._attn_implementation = attention
    made = LlamaForCausalLM(config).to(getattr(torch, dtype))
    return peftctl.attach(made, peftctl.METHODS["lora"](r=8)).train()


def step(network: nn.Module, layout: Layout, chosen: list[int]) -> float:
    """CPU seconds of one step."""
    begun = time.process_time()
    for part in layout.micro_batches(chosen):
        sft.loss(network, layout.batch(part, torch.device("cpu"))).backward()
    took = time.process_time() - begun
    network.zero_grad(set_to_none=True)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--kinds", nargs="*", default=list(DRAWS))
    parser.add_argument("--batches", nargs="*", default=["16/4", "16/16", "64/8"], help="rows a step / a micro-batch")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    titles = ["rows", "batch", "work saved by count", "tokens/s padded", "packed", "speed-up"]
    if given.memory:
        titles = ["rows", "batch", "peak memory padded", "packed"]
    if not given.only:
        print("| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", sep="\n")
    network = model(given.attention, given.dtype, given.layers)
    for kind in given.kinds:
        for batch in given.batches:
            size, micro = map(int, batch.split("/"))
            made = rows(kind, size * given.rounds)
            padded, packed = (Layout(made, micro, 0, packing) for packing in (None, "lines"))  # type: ignore[arg-type]
            steps = order([len(row) for row in made], size, 0, 0)
            if given.only:
                for chosen in steps:
                    step(network, packed if given.only == "packed" else padded, chosen)
                print(peak_memory())
                return
            if given.memory:
                words = [sys.executable, __file__, *sys.argv[1:], "--kinds", kind, "--batches", batch, "--only"]
                peaks = [int(subprocess.check_output([*words, name])) / 2**20 for name in ("padded", "packed")]
                print(f"| {kind} | {batch} | {peaks[0]:.0f} MiB | {peaks[1]:.0f} MiB |", flush=True)
                continue
            step(network, padded, steps[0][:4])
            times = [(step(network, padded, chosen), step(network, packed, chosen)) for chosen in steps]
            tokens = sum(len(row) for row in made)
            saved = 1 - work(network, packed, steps) / work(network, padded, steps)
            speeds = [tokens / sum(one) for one in zip(*times, strict=True)]
            ratios = sorted(one / other for one, other in times)
            shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {kind} | {batch} | {saved:.0%} | {speeds[0]:.0f} | {speeds[1]:.0f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
