"""Optimizers from torch, bitsandbytes and transformers, by the name a recipe gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from peftctl.errors import RecipeError
from peftctl.models.quantization import bitsandbytes, without_downloads

Name = Literal["adamw", "sgd", "adafactor", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


def build_optimizer(name: str, groups: list[dict[str, Any]], weight_decay: float) -> Optimizer:
    """An optimizer over `groups`, each a dict of `params` and `lr`.

    Weight decay [fraction per step and unit of learning rate] is for matrices; vectors such as biases and scales
    have none. Raises RecipeError for an optimizer that this device does not run.
    """
    split = [part for group in groups for part in by_decay(group, weight_decay)]
    if name == "adamw":
        return torch.optim.AdamW(split, fused=on_cuda(split) or None)
    if name == "sgd":
        return torch.optim.SGD(split, momentum=0.9)
    if name == "adafactor":
        with without_downloads():
            from transformers.optimization import Adafactor
        adafactor: Optimizer = Adafactor(split, scale_parameter=False, relative_step=False, warmup_init=False)
        return adafactor
    return eight_bit_or_paged(name, split)


def eight_bit_or_paged(name: str, groups: list[dict[str, Any]]) -> Optimizer:
    """bitsandbytes' AdamW with its state in 8 bits, in pages that move to the CPU when a GPU is full, or both."""
    if name.startswith("paged") and not on_cuda(groups):
        raise RecipeError(f"trainer.optimizer: `{name}` needs a CUDA device", "use `adamw`, or `adamw_8bit`")
    optim = bitsandbytes().optim
    classes: dict[str, Callable[..., Optimizer]] = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    return classes[name](groups)


def by_decay(group: dict[str, Any], weight_decay: float) -> list[dict[str, Any]]:
    """A group as up to two: matrices with weight decay, vectors without."""
    parts = [
        {**group, "params": [p for p in group["params"] if p.ndim >= 2], "weight_decay": weight_decay},
        {**group, "params": [p for p in group["params"] if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [part for part in parts if part["params"]]


def on_cuda(groups: list[dict[str, Any]]) -> bool:
    return all(p.is_cuda for group in groups for p in group["params"])


def build_schedule(name: str, update: Optimizer, warmup: int, steps: int) -> Any:
    """transformers' schedule `name`: `warmup` steps up to the peak, then down over the rest of `steps`.

    It begins one step in and ends one later, because a step at a rate of zero is a step for nothing.
    """
    with without_downloads():
        from transformers import get_scheduler
    if name == "constant":
        name = "constant_with_warmup"
    schedule = get_scheduler(name, update, num_warmup_steps=warmup + 1, num_training_steps=steps + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects an optimizer step first
        schedule.step()
    return schedule
