"""Valid inputs to spoil, made here."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from fuzz.mutations import Case
from torch import nn
from toy_run import Run

import peftctl
from peftctl import bundled

CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"messages": [{"role": "system", "content": "be é"}, {"role": "user", "content": "?"}]},
]
ROWS = [
    *CHATS,
    {"prompt": "a", "completion": " b\n"},
    {"text": "one\ttwo 😀 \\ \" ' {x}"},
    {"instruction": "say", "input": "", "output": "it", "n": [1, 2.5, None, True, {"deep": [[]]}]},
    {"prompt": "q", "chosen": "yes", "rejected": "no"},
    {"tokens": ["Ada", "sleeps"], "tags": ["B-PER", "O"]},
]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"r": 2, "target_modules": ["q_proj"]},
    "adalora": {"init_r": 4, "target_r": 2, "target_modules": ["q_proj"]},
    "ia3": {},
    "vera": {"r": 4, "target_modules": ["q_proj"]},
    "oft": {"target_modules": ["q_proj"]},
    "prompt": {"num_virtual_tokens": 3},
    "prefix": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3},
    "bottleneck": {},
    "reft": {},
    "layers": {"norms": True},
    "gralora": {"r": 4, "target_modules": ["q_proj"]},
    "mora": {"r": 4, "target_modules": ["q_proj"]},
}


def files(folder: Path) -> Case:
    """Everything in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def adapters(folder: Path) -> list[Case]:
    """A folder of every kind of adapter; LoRA, the one that strangers send, three times."""
    more: list[tuple[str, dict[str, Any]]] = [
        ("lora", {"r": 2, "target_modules": "all-linear", "use_rslora": True}),
        ("lora", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ]
    cases = []
    for name, fields in [*METHODS.items(), *more]:
        model = peftctl.attach(tiny.build("llama"), peftctl.METHODS[name](**fields))
        cases.append(files(peftctl.save(model, folder / f"{len(cases)}")))
    return cases


def recipes() -> list[Case]:
    """The bundled recipes, without their comments, and one with the parts that those leave out."""
    texts = [bundled.path(name).read_text(encoding="utf-8") for name in bundled.names()]
    more = """\
model: {name_or_path: base, dtype: float32, device: cpu}
method: {type: lora, r: 4, alpha: 8, dropout: 0.1, target_modules: [q_proj, "v_proj"], rank_pattern: {q_proj: 2}}
dataset:
  train: [{path: a.jsonl, weight: 2, format: messages}, &rows b.csv]
  eval: {one: *rows, two: {path: c.txt, sample_by: line}}
trainer: {task: {type: dpo, beta: 0.2}, steps: 6, batch_size: 4, learning_rate: 1e-2}
eval: {metrics: [loss], gates: {loss: {max: 2.5}}}
export: {format: peft}
output: run
seed: 0
"""
    return [{"recipe.yaml": text.encode()} for text in [*texts, more]]


def rows() -> list[Case]:
    """A file of every kind that is text."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    cells = 'prompt,completion\n"a ""quoted"" b",c\n"two\nlines",d é\r\n,\n1e5,007\n'
    text = "One.\n\nTwo é 😀\nstill two\n\n\nThree\r\n"
    made = {"rows.jsonl": lines, "rows.json": json.dumps(ROWS, indent=1), "rows.csv": cells, "rows.txt": text}
    made |= {"rows.tsv": 'text\tlabel\nsaid "so"\tgood\n"a\tb"\tbad\n', "rows.md": "# A\n\n- b\n"}
    return [{name: content.encode()} for name, content in made.items()]


def parquet(folder: Path) -> list[Case]:
    """Small Parquet files, of plain and of nested columns."""
    import pyarrow
    from pyarrow import parquet as files_of

    cases = []
    for number, table in enumerate(({"text": ["a", "é", None]}, {"messages": [row["messages"] for row in CHATS]})):
        path = folder / f"{number}.parquet"
        for checked in (True, False):
            files_of.write_table(pyarrow.table(table), path, write_page_checksum=checked)
            cases.append({"rows.parquet": path.read_bytes()})
    return cases


class Gguf:
    """A GGUF file in the making, which remembers where its numbers are."""

    def __init__(self) -> None:
        self.data, self.spans = bytearray(), list[tuple[int, str]]()

    def number(self, form: str, value: float) -> None:
        self.spans.append((len(self.data), form))
        self.data += struct.pack(form, value)

    def text(self, value: str) -> None:
        self.number("<Q", len(value.encode()))
        self.data += value.encode()


VALUES: Mapping[str, Any] = {
    "general.architecture": "llama",
    "general.alignment": (4, "<I", 32),
    "llama.block_count": (4, "<I", 1),
    "llama.rope": (6, "<f", 1e4),
    "llama.wide": (10, "<Q", 2**40),
    "llama.odd": (0, "<B", 3),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "é"],
    "tokenizer.ggml.scores": (6, "<f", [0.0, 1.0, -1.0]),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": (4, "<I", 1),
    "tokenizer.ggml.eos_token_id": (4, "<I", 2),
    "tokenizer.chat_template": "{{ messages }}",
}


def gguf(shapes: Sequence[tuple[str, tuple[int, ...], int]], values: Mapping[str, Any] = VALUES) -> Gguf:
    """A file with these tensors in float32 (0) or float16 (1)."""
    file = Gguf()
    file.data += b"GGUF"
    file.number("<I", 3)
    file.number("<Q", len(shapes))
    file.number("<Q", len(values))
    for key, value in values.items():
        file.text(key)
        if isinstance(value, str):
            file.number("<I", 8)
            file.text(value)
            continue
        kind, form, items = (8, "", value) if isinstance(value, list) else value
        if isinstance(items, list):
            file.number("<I", 9)
            file.number("<I", kind)
            file.number("<Q", len(items))
        else:
            file.number("<I", kind)
        for item in items if isinstance(items, list) else [items]:
            file.text(item) if isinstance(item, str) else file.number(form, item)
    offset = 0
    for name, shape, kind in shapes:
        file.text(name)
        file.number("<I", len(shape))
        for size in shape:
            file.number("<Q", size)
        file.number("<I", kind)
        file.number("<Q", offset)
        offset += -(-math.prod(shape) * (4, 2)[kind] // 32) * 32
    file.data += b"\0" * (-len(file.data) % 32 + offset)
    return file


GGUFS = [
    gguf([("token_embd.weight", (8, 5), 0), ("blk.0.attn_q.weight", (8, 8), 1)]),
    gguf([("a", (32,), 0)], {"general.architecture": "x"}),
    gguf([(f"blk.{i}.w", (4, 2, 2), i % 2) for i in range(20)]),
]


def checkpoints(folder: Path) -> list[Case]:
    """A committed checkpoint."""
    run = Run(folder)
    run.train(2)
    return [files(run.save())]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
