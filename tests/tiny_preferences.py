"""Preferences about small texts, as texts and as chats, and an adapter that has something to say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import tiny_chat
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.formats import Example, Feedback, Preference
from peftctl.data.reading import Reading
from peftctl.engine.attach import adapters_of, attach
from peftctl.engine.disk import save
from peftctl.methods import METHODS
from peftctl.models import base as models

LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def texts(number: int) -> list[dict[str, Any]]:
    """Answers of different lengths to different prompts."""
    return [
        {"prompt": f"{'ab' * (i % 3)}{chr(97 + i)}? ", "chosen": "yes" + "!" * (i % 4), "rejected": "n" + "o" * (i % 5)}
        for i in range(number)
    ]


def chats(number: int) -> list[dict[str, Any]]:
    """The same as messages."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": roles[key], "content": row[key]}] for key in roles} for row in texts(number)]


def feedback(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every second answer as one that was judged to be good, the others as bad ones."""
    keys = ["chosen" if i % 2 else "rejected" for i in range(len(rows))]
    return [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row, key in zip(rows, keys, strict=True)
    ]


def example(row: dict[str, Any], place: str = "rows.jsonl:1") -> Example:
    """A row as it is read."""
    if "label" in row:
        return Feedback(place, row["prompt"], row["completion"], row["label"])
    return Preference(place, **row)


def encoded(rows: list[dict[str, Any]], reading: Reading, **settings: Any) -> list[Encoded]:
    """Rows as they are prepared."""
    template = tiny_chat.TEMPLATE if isinstance(rows[0]["prompt"], list) else None
    encoder = reading.encoder(Dataset(train="rows.jsonl", **settings), tiny_chat.tokenizer(), template)
    made = [encoder.encode(example(row, f"rows.jsonl:{n}")) for n, row in enumerate(rows, 1)]
    return [piece for pieces in made for piece in pieces]


def plain(base: Path) -> Any:
    """The base as peftctl loads it."""
    return models.load(models.Model(name_or_path=str(base), dtype="float32", device="cpu")).model


def stirred(base: Path, seed: int = 0) -> Any:
    """The base with a LoRA that changes what it says."""
    model = plain(base)
    attach(model, METHODS["lora"](**LORA))
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters_of(model, "default").values():
        for parameter in adapter.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def trained_by_peft(base: Path) -> nn.Module:
    """The base with peft's LoRA of the same settings, at its start."""
    settings = peft.LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=LORA["target_modules"], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)  # type: ignore[return-value]


def copied(model: nn.Module, theirs: Any, folder: Path) -> None:
    """Give peft's adapter the weights of ours."""
    save(model, folder)
    peft.set_peft_model_state_dict(theirs, load_file(folder / "adapter_model.safetensors"))
