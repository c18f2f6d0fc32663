"""Stopped by a signal, a run saves; resumed, it ends with the bits of the run that was never stopped."""

from __future__ import annotations

import hashlib
import json
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
from toy_run import steps_in

import peftctl
from peftctl.config.write import to_yaml
from peftctl.verbs.run_folder import RunFolder

LONG = {"steps": 150, "save_every": 60, "eval_every": 50}


def wait_for(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.01)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def sha256(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_interrupted_and_resumed_is_never_interrupted(made: Callable[..., Any], tmp_path: Path):
    wanted = made(trainer=LONG)
    (tmp_path / "recipe.yaml").write_text(to_yaml(wanted))
    run, process = tmp_path / "run", tiny_chat.start(tiny_chat.command("train", "recipe.yaml"), tmp_path)
    wait_for(lambda: lines(run / "metrics.jsonl") > 7, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert out == ""
    assert "stopped by SIGTERM after step" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert not RunFolder(run).finished
    stopped_at = len(tiny_chat.steps(run))
    assert 7 < stopped_at < 150
    assert steps_in(run / "checkpoints")[-1] == stopped_at

    said: list[str] = []
    peftctl.train(wanted, output=run, resume=True, listen=lambda event: said.append(str(event.get("text"))))
    assert f"going on after step {stopped_at}" in said
    assert not [line for line in said if "not bit for bit" in line]
    peftctl.train(wanted, output=tmp_path / "whole")
    assert sha256(run) == sha256(tmp_path / "whole")
    for key in ("step", "loss", "learning_rate", "gradient_norm", "tokens"):
        then, now = ([event[key] for event in tiny_chat.steps(folder)] for folder in (tmp_path / "whole", run))
        assert then == now


@pytest.mark.parametrize("step", [1, 3, 5])
def test_stopped_at_any_step(step: int, made: Callable[..., Any], tmp_path: Path, finished: Path):
    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(peftctl.PeftctlError, match=f"stopped by SIGINT after step {step} of 6, saved") as caught:
        peftctl.train(made(), output=tmp_path / "run", listen=kill)
    assert caught.value.exit_code == 75
    peftctl.train(made(), output=tmp_path / "run", resume=True)
    assert sha256(tmp_path / "run") == sha256(finished)


def kill_at(step: int) -> Callable[[dict[str, Any]], None]:
    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return kill


def test_a_signal_at_the_last_step_ends_the_run(made: Callable[..., Any], tmp_path: Path):
    recipe = made(dataset={"eval": None})
    assert peftctl.train(recipe, output=tmp_path / "run", listen=kill_at(6))["steps"] == 6
    assert RunFolder(tmp_path / "run").finished


def test_an_evaluation_is_left_at_once_and_made_again(made: Callable[..., Any], tmp_path: Path, finished: Path):
    told: list[dict[str, Any]] = []
    recipe = made(trainer={"eval_every": 3})
    for step in (3, 6):
        with pytest.raises(peftctl.PeftctlError, match=f"stopped by SIGTERM after step {step} of 6, saved"):
            peftctl.train(recipe, output=tmp_path / "run", resume=step > 3, listen=kill_at(step))
    peftctl.train(recipe, output=tmp_path / "run", resume=True, listen=told.append)
    assert [event["step"] for event in told if event["event"] == "eval"] == [6]
    peftctl.train(recipe, output=tmp_path / "whole")
    assert sha256(tmp_path / "run") == sha256(tmp_path / "whole")
    for name in ("step", "eval"):
        one, other = (
            [{**event, "seconds": 0, "memory": 0} for event in events(tmp_path / run) if event["event"] == name]
            for run in ("run", "whole")
        )
        assert one == other


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_signal_before_the_first_step_leaves_nothing(made: Callable[..., Any], tmp_path: Path):
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)

    def kill(event: dict[str, Any]) -> None:
        said.append(event["event"])
        if len(said) == 1:  # a second signal would end this process at once
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(peftctl.PeftctlError, match="stopped by SIGINT before the first step") as caught:
        peftctl.train(made(), output=tmp_path / "run", listen=kill)
    assert caught.value.exit_code == 130
    assert "plan" not in said
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.1, 0.4, 1.0, 1.6, 2.2, 2.8, 3.4])
def test_ctrl_c_while_it_starts_is_no_traceback(delay: float, made: Callable[..., Any], tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(to_yaml(made(trainer=LONG)))
    process = tiny_chat.start(tiny_chat.command("train", "recipe.yaml"), tmp_path)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (75, 130, -signal.SIGINT), err
    if process.returncode in (75, 130):  # else Python itself was still starting
        assert "Traceback" not in err
    assert not RunFolder(tmp_path / "run").finished


IMPORTING = """
import os, signal, sys
from pathlib import Path
import peftctl.cli
Path("half.py").write_text(
    "import os, signal\\ntry:\\n    os.kill(os.getpid(), signal.SIGINT)\\n    for _ in range(10**7): pass\\n"
    "except KeyboardInterrupt:\\n    pass\\n"
)
sys.path.insert(0, ".")
def tell():
    print("told", flush=True)
with peftctl.cli.imports_left_whole(tell):
    import half
print("went on")
"""


def test_ctrl_c_in_an_import_that_would_swallow_it(tmp_path: Path):
    process = tiny_chat.start([sys.executable, "-c", IMPORTING], tmp_path)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "told\n")


def test_a_stopped_merge_leaves_nothing(finished: Path, tmp_path: Path):
    from peftctl.verbs.merge import merge

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(peftctl.PeftctlError, match="stopped by SIGTERM") as caught:
        merge(str(finished), tmp_path / "merged", listen=kill)
    assert caught.value.exit_code == 130
    assert list(tmp_path.iterdir()) == []
