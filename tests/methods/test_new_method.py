"""Adding a method edits no file: one that is dropped into the package is listed, described, trained, saved and read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tiny_chat
from safetensors.torch import load_file

import peftctl
from peftctl.config.write import to_yaml

SHIFT = '''
"""A learned vector added to what a linear computes: y = W x + b + v, v [out]. Nobody 2026, arXiv:0000.00000."""

from dataclasses import dataclass

import torch

from peftctl.engine.adapter import Adapter
from peftctl.engine.hosts import features
from peftctl.engine.method import Targeted, register


class Shifted(Adapter):
    """x [..., in] -> y [..., out]."""

    def __init__(self, host):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(features(host)[1]))

    def forward(self, base, x):
        y = base(x)
        return y + self.shift.to(y.dtype)


@register
@dataclass(frozen=True, kw_only=True)
class Shift(Targeted):
    """Shifts."""

    peft_type = "SHIFT"
    learning_rate = 1e-2
    merges = "nowhere: it is a toy"

    def adapter(self, site):
        return Shifted(site.module)

    def peft_config(self, adapters):
        return {"target_modules": sorted(adapters)}

    @classmethod
    def from_peft(cls, config, shapes, place):
        return cls(target_modules=sorted(name.removesuffix(".shift") for name in shapes))
'''


def run(folder: Path, *words: str) -> str:
    process = tiny_chat.start(tiny_chat.command(*words), folder, PYTHONPATH=str(folder))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_a_file_dropped_into_the_package_is_a_method(tmp_path: Path):
    source = Path(peftctl.__file__).parent
    shutil.copytree(source, tmp_path / "peftctl", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "peftctl" / "methods" / "shift.py").write_text(SHIFT)
    base = tiny_chat.write_base(tmp_path / "base")
    rows = tiny_chat.write_rows(tmp_path / "rows.jsonl", tiny_chat.chats(11))
    made = tiny_chat.recipe(base, rows, rows, trainer={"steps": 3})
    made["method"] = {"type": "shift", "target_modules": "attention"}
    (tmp_path / "recipe.yaml").write_text(to_yaml(made))

    assert "shift" in run(tmp_path, "methods")
    assert "arXiv:0000.00000" in run(tmp_path, "methods", "shift")
    run(tmp_path, "train", "recipe.yaml")
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert len(tensors) == 8  # four linears of attention in two blocks
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    run(tmp_path, "eval", "run")
    figures = json.loads((tmp_path / "run/eval.json").read_text())["figures"]
    assert figures["adapter"]["loss"] < figures["base"]["loss"]
