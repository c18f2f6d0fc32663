"""Two processes train what one does, under torchrun and under accelerate's launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
from two_processes import accelerate, compare, launched, torchrun

import peftctl
from peftctl.config.write import to_yaml
from peftctl.verbs.mortal import one_thread

EVEN = {"dropout": 0.0}  # dropout draws other numbers in each process


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, made: Callable[..., Any]) -> Path:
    """What one process makes of the recipe."""
    folder = tmp_path_factory.mktemp("alone")
    with one_thread():
        peftctl.train(made(method=EVEN), output=folder / "run")
    return folder / "run"


@pytest.fixture
def folder(tmp_path: Path, made: Callable[..., Any]) -> Path:
    (tmp_path / "recipe.yaml").write_text(to_yaml(made(method=EVEN)))
    return tmp_path


def test_torchrun(folder: Path, alone: Path):
    code, out, err = launched(torchrun(), folder)
    assert code == 0, err
    assert out == "run\n"  # said once
    assert err.count("saved step 6") == 1
    compare(alone, folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_launch(precision: str, folder: Path, alone: Path):
    code, out, err = launched([*accelerate(), f"--mixed_precision={precision}"], folder)
    assert code == 0, err
    assert out == "run\n"
    compare(alone, folder / "run")  # the recipe says how precise; the launcher does not


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_processes_have_room_for(rows: int, made: Callable[..., Any], tmp_path: Path):
    data = tiny_chat.write_rows(tmp_path / "few.jsonl", tiny_chat.chats(rows))
    wanted = made(method=EVEN, dataset={"train": str(data), "eval": str(data)}, trainer={"micro_batch_size": 1})
    (tmp_path / "recipe.yaml").write_text(to_yaml(wanted))
    code, _, err = launched(torchrun(), tmp_path)
    assert code == 0, err
    peftctl.train(wanted, output=tmp_path / "alone")
    compare(tmp_path / "alone", tmp_path / "run")


@pytest.mark.slow
def test_one_process_of_accelerates_for_the_cpu(folder: Path, alone: Path):
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--mixed_precision=bf16"]
    code, out, err = launched(launcher, folder)
    assert (code, out) == (0, "run\n"), err
    one, two = (run / "adapter" / "adapter_model.safetensors" for run in (alone, folder / "run"))
    assert one.read_bytes() == two.read_bytes()


def begun(folder: Path, recipe: Any, lines: int = 9) -> subprocess.Popen[str]:
    """Two processes that have told so many lines."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    line = [sys.executable, "-m", *torchrun(), "-m", "peftctl", "train", "recipe.yaml"]
    process = tiny_chat.start(line, folder)
    metrics, until = folder / "run" / "metrics.jsonl", time.monotonic() + 100
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)
    return process


def ranks(launcher: int) -> dict[int, int]:
    """The process of each rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    told = {int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children}
    return {int(line[5:]): child for child, lines in told.items() for line in lines if line.startswith(b"RANK=")}


@pytest.fixture(scope="module")
def long(made: Callable[..., Any]) -> Any:
    """A recipe of many steps on rows that two processes cannot share evenly."""
    return made(trainer={"steps": 300, "save_every": 20, "eval_every": 150})


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, long: Any) -> bytes:
    """The adapter of two processes that nobody stops."""
    folder = tmp_path_factory.mktemp("together") / "whole"
    process = begun(folder, long, lines=1)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "how"), [(None, "SIGTERM"), (1, "SIGTERM"), (0, "SIGTERM"), (1, "SIGKILL"), (0, "SIGKILL")]
)
def test_stopped_and_resumed(who: int | None, how: str, long: Any, together: bytes, tmp_path: Path):
    folder, lines = tmp_path / "broken", 9 if how == "SIGTERM" else 45
    process = begun(folder, long, lines)
    os.kill(process.pid if who is None else ranks(process.pid)[who], getattr(signal, how))
    stopped = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - stopped < 45
    assert process.returncode != 0, err
    assert not (folder / "run" / "adapter").exists()
    told = len(tiny_chat.steps(folder / "run"))
    assert 8 <= told < 300
    code, _, err = launched(torchrun(), folder, "--resume")
    assert code == 0, err
    went_on = int(err.split("going on after step ")[1].split()[0])
    assert told - went_on <= (0 if how == "SIGTERM" else 20)
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == together


@pytest.mark.slow
def test_a_finished_run_is_left_alone(folder: Path):
    assert launched(torchrun(), folder)[0] == 0
    before = tiny_chat.tree(folder / "run")
    code, out, err = launched(torchrun(), folder)
    assert (code, out) == (0, "run\n"), err
    assert tiny_chat.tree(folder / "run") == before
