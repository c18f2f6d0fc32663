"""The arm of peft in a plain loop, as a careful person writes it: right sums, fused AdamW, sorted micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.job import IGNORED, Clock, Job, cut, trained


def run(job: Job, clock: Clock) -> None:
    """Train, with the mean loss of every optimizer step over all its trained tokens."""
    model = adapted(job).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    update = torch.optim.AdamW(parameters, lr=job.rate, weight_decay=0.0, fused=True)
    allocate = getattr(model.base_model, "update_and_allocate", None)  # AdaLoRA moves its ranks between steps
    clock.ready()
    for number, rows in enumerate(job.read_steps()[: job.steps]):
        weight, total = trained(rows), torch.zeros(())
        for part in cut(rows, job.micro):
            loss = model(**padded(part), use_cache=False, num_items_in_batch=weight).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        update.step()
        if allocate is not None:
            allocate(number)
        update.zero_grad()
        clock.step(float(total), sum(len(row["input_ids"]) for row in rows))


def adapted(job: Job) -> Any:
    """The base in bfloat16, in 4 bits where asked for, with the adapter that all arms start from."""
    base = load(job)
    if not (job.start or job.config):  # nothing of peft's: the whole model
        return base
    if job.start and peft.PeftConfig.from_pretrained(job.start).is_prompt_learning:
        return prompted(base, job.start)
    if job.start:
        return peft.PeftModel.from_pretrained(base, job.start, is_trainable=True, autocast_adapter_dtype=not job.half)
    torch.manual_seed(0)
    config = getattr(peft, job.config["class"])(task_type="CAUSAL_LM", **job.config["arguments"])
    return peft.get_peft_model(base, config, autocast_adapter_dtype=not job.half)


def prompted(base: Any, folder: str) -> Any:
    """The base with the virtual tokens of a folder: peft reads them for inference alone, so they are put in place."""
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    model = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(model, load_file(Path(folder) / "adapter_model.safetensors"))
    return model


def load(job: Job) -> Any:
    options: dict[str, Any] = {}
    if job.nf4:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32 if job.exact else torch.bfloat16, attn_implementation=job.attention, **options
    )


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` [rows, tokens], padded on the right to the longest row."""
    length = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], filling: int) -> torch.Tensor:
        return torch.tensor([value + [filling] * (length - len(value)) for value in values])

    ids = filled([row["input_ids"] for row in rows], 0)
    mask = filled([[1] * len(row["input_ids"]) for row in rows], 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": filled([row["labels"] for row in rows], IGNORED)}
