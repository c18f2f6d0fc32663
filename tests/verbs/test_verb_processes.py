"""Two processes train what one does, under torchrun and under accelerate's launcher."""

from __future__ import annotations

import signal
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

EVEN = {"dropout": 0.0}  # dropout draws other numbers in each process


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, made: Callable[..., Any]) -> Path:
    """What one process makes of the recipe."""
    folder = tmp_path_factory.mktemp("alone")
    with tiny_chat.one_thread():
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


@pytest.mark.slow
def test_stopped_and_resumed(made: Callable[..., Any], tmp_path: Path):
    trainer = {"steps": 300, "save_every": 120, "eval_every": 150}
    for name, path in (("whole", tmp_path / "whole"), ("broken", tmp_path / "broken")):
        path.mkdir()
        (path / "recipe.yaml").write_text(to_yaml(made(trainer=trainer)))
        line = [sys.executable, "-m", *torchrun(), "-m", "peftctl", "train", "recipe.yaml"]
        process = tiny_chat.start(line, path)
        if name == "broken":
            metrics, until = path / "run" / "metrics.jsonl", time.monotonic() + 100
            while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 9:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < until
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=200)
        assert (process.returncode == 0) == (name == "whole"), err
    assert not (tmp_path / "broken" / "run" / "adapter").exists()
    assert 8 <= len(tiny_chat.steps(tmp_path / "broken" / "run")) < 300
    code, _, err = launched(torchrun(), tmp_path / "broken", "--resume")
    assert code == 0, err
    assert "going on after step" in err
    one, two = (tmp_path / name / "run" / "adapter" / "adapter_model.safetensors" for name in ("whole", "broken"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_a_finished_run_is_left_alone(folder: Path):
    assert launched(torchrun(), folder)[0] == 0
    before = tiny_chat.tree(folder / "run")
    code, out, err = launched(torchrun(), folder)
    assert (code, out) == (0, "run\n"), err
    assert tiny_chat.tree(folder / "run") == before
