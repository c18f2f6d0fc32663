"""Runs of a recipe in two processes, and what they have to have in common with the run of one."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import tiny_chat
import torch
from safetensors.torch import load_file


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def torchrun() -> list[str]:
    return ["torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]


def accelerate() -> list[str]:
    # its `--cpu` starts one process, whatever the number; the recipe's `device: cpu` keeps these two off a GPU
    return ["accelerate.commands.launch", "--num_processes=2", "--multi_gpu", f"--main_process_port={free_port()}"]


def launched(launcher: list[str], folder: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    line = [sys.executable, "-m", *launcher, "-m", "peftctl", "train", "recipe.yaml", *words]
    process = tiny_chat.start(line, folder, **environment)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def processes(run: Path) -> str:
    newest = max((run / "checkpoints").iterdir())
    return str(json.loads((newest / "state.json").read_text())["surroundings"]["processes"])


def compare(one: Path, two: Path) -> None:
    assert (processes(one), processes(two)) == ("1", "2")
    expected, found = tiny_chat.journal(one), tiny_chat.journal(two)
    keys = {"loss", "gradient_norm", "learning_rate", "tokens", "trained_tokens"}
    assert [(e["event"], e.get("step")) for e in found] == [(e["event"], e.get("step")) for e in expected]
    for then, now in zip(expected, found, strict=True):
        for key in keys & then.keys():
            assert now[key] == pytest.approx(then[key], rel=1e-4), (key, then)
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-4, rtol=0)
