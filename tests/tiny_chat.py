"""A tiny Llama that chats: weights, tokenizer and chat template in one folder, rows to train it on, and a recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '<bos>' + m['role'][0] + ':' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>a:' }}{% endif %}"
)
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(chr(code) for code in range(32, 32 + tiny.VOCAB - 4))]
LABELS = ["yes", "no", "maybe"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)


def write_base(folder: Path, seed: int = 0) -> Path:
    """The model in `folder`; its weights are large enough for its answers to differ from prompt to prompt."""
    model = tiny.build("llama", seed)
    tiny.stir(model, seed)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def chats(number: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of different lengths whose answer follows from the question."""
    questions = [f"{'is it ' * (i % 3)}{chr(97 + i % 26)}{'!' * (i * 7 % 5)}?" for i in range(start, start + number)]
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": LABELS[len(text) % 3]}]}
        for text in questions
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(base: Path, train: Path, held_out: Path | None = None, **blocks: Mapping[str, Any] | str | int) -> Any:
    """A recipe as a mapping: eleven rows in steps of four, so nothing divides evenly; `blocks` are laid over it."""
    made: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32", "device": "cpu"},
        "method": {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear"},
        "dataset": {"train": str(train), **({"eval": str(held_out)} if held_out else {})},
        "trainer": {"steps": 6, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 1e-2, "save_every": 2},
        "output": "run",
    }
    for name, block in blocks.items():
        made[name] = {**made.get(name, {}), **block} if isinstance(block, Mapping) else block
    return made


def command(*words: str | Path) -> list[str]:
    """A command line of peftctl for a process of its own."""
    return [sys.executable, "-m", "peftctl", *map(str, words)]


def start(words: Sequence[str], folder: Path, **more: str) -> subprocess.Popen[str]:
    """Starts a process in `folder` with one thread and neither network nor GPU."""
    here = str(Path(__file__).parents[1])
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": here}
    return subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, **quiet, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells let what runs behind ignore it
    )


def journal(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[dict[str, Any]]:
    return [event for event in journal(run) if event["event"] == "step"]


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below `folder` with its time of change and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def plain(folder: Path) -> Any:
    """The model in `folder` as plain transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
