"""The arms of transformers' Trainer and TRL's SFTTrainer with peft, on the same rows in the same order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks.job import Clock, Job
from benchmarks.loop import adapted, padded


class Told(TrainerCallback):  # type: ignore[misc]
    """Stops the clock when a step's loss is logged, which is the end of the step."""

    def __init__(self, clock: Clock, tokens: Callable[[int], int]) -> None:
        self.clock, self.tokens = clock, tokens

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.ready()

    def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, float], **___: Any) -> None:
        if "loss" in logs:
            self.clock.step(logs["loss"], self.tokens(state.global_step - 1))


class Counted:
    """A collator that remembers how many tokens of rows every batch had."""

    def __init__(self, inner: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.inner = inner
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.inner(rows)


def run(job: Job, clock: Clock) -> None:
    """Train with the job's kind of trainer: no shuffling, no checkpoints, no reports, a log at every step."""
    rows = [row for step in job.read_steps() for row in step]
    data = Dataset.from_list(rows)
    every = max(1, job.batch // job.micro)
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": job.steps,
            "per_device_train_batch_size": job.micro,
            "gradient_accumulation_steps": every,
            "learning_rate": job.rate,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,  # the weights are bfloat16 already; autocast would only add casts
            "gradient_checkpointing": False,
            "seed": 0,
        }
        if job.kind == "trainer":
            made: Any = Trainer(adapted(job), TrainingArguments(**arguments), train_dataset=data, data_collator=padded)
        else:
            made = sft(job, arguments, data)
        made.data_collator = counted = Counted(made.data_collator)
        made.add_callback(Told(clock, lambda step: sum(counted.tokens[step * every : (step + 1) * every])))
        made.train()


def sft(job: Job, arguments: dict[str, Any], data: Dataset) -> Any:
    """TRL's trainer; packed rows are TRL's own order and batches, so its losses belong to other rows."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    packing: dict[str, Any] = {"max_length": None}
    if job.packed:
        packing = {"packing": True, "packing_strategy": "bfd", "max_length": job.packed}
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    return SFTTrainer(
        adapted(job), args=SFTConfig(**arguments, **packing), train_dataset=data, processing_class=tokenizer
    )
