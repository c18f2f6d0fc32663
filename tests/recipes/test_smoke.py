"""`train --smoke` takes any recipe through every stage: without a network, a GPU, or a trace."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_chat

from peftctl import bundled
from peftctl import recipe as recipes
from peftctl.cli import main
from peftctl.data.file import Row
from peftctl.data.formats import FORMS, check
from peftctl.errors import ModelError, PeftctlError, RunError
from peftctl.verbs.imitation import Imitation
from peftctl.verbs.made_up import made_up
from peftctl.verbs.smoke import smoke

STAGES = ["prepare", "train", "resume", "eval", "merge", "export"]
SAMPLE = ["chat-llama3.2-3b-qlora", "text-llama3.1-8b-lora", "methods/bitfit", "methods/fusion"]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and temporary files in a folder of the test's own, which is watched."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a smoke run asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def outcomes(result: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["outcome"] for stage in result["stages"]}


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in bundled.names()]
)
def test_every_bundled_recipe_passes(name: str, nowhere: Path):
    read = recipes.read(name)
    result = smoke(read)
    assert [stage["stage"] for stage in result["stages"]] == STAGES
    merged = outcomes(result)["merge"]
    assert merged.startswith("does not merge" if read.method.merges.startswith("not") else "logits within")
    assert not [path for path in nowhere.iterdir() if path.name.startswith("peftctl-smoke")]
    assert {path.name for path in nowhere.parent.iterdir()} == {"temporary"}


def mine(tmp_path: Path, **blocks: Any) -> recipes.Recipe:
    rows = tiny_chat.write_rows(tmp_path / "rows.jsonl", tiny_chat.chats(11))
    return recipes.coerce(tiny_chat.recipe(Path("openai-community/gpt2"), rows, rows, **blocks))


def test_what_is_kept_is_real_and_gates_are_not_judged(tmp_path: Path):
    read = mine(tmp_path, eval={"metrics": ["loss"], "gates": {"loss": {"max": 0.001}}})
    result = smoke(read, output=tmp_path / "kept")
    assert outcomes(result)["eval"] == "loss; 1 gates not judged"
    assert json.loads((tmp_path / "kept" / "run" / "eval.json").read_text())["gates"][0]["metric"] == "loss"
    assert tiny_chat.plain(tmp_path / "kept" / "merged").config.model_type == "gpt2"
    with pytest.raises(RunError, match="exists already"):
        smoke(read, output=tmp_path / "kept")


@pytest.mark.parametrize("form", sorted(FORMS))
def test_made_up_rows_are_of_their_form(form: Any):
    for labels in ([], ["yes", "no"]):
        rows = [Row(f"rows:{n}", value) for n, value in enumerate(made_up(form, labels, 4))]
        assert [check(row, form).place for row in rows] == [row.place for row in rows]


def test_layers_that_are_named_are_there(tmp_path: Path):
    read = mine(tmp_path, method={"layers_to_transform": [9, 11], "target_modules": ["c_attn"]})
    small = Imitation(tmp_path, lambda text: None).of(read)
    assert json.loads((Path(small.model.name_or_path) / "config.json").read_text())["n_layer"] == 12


def test_mistakes_are_those_of_a_real_run(tmp_path: Path, nowhere: Path):
    (tmp_path / "rows.jsonl").write_text('{"messages": [}\n')
    broken = recipes.coerce(tiny_chat.recipe(Path("gpt2"), tmp_path / "rows.jsonl"))
    events: list[dict[str, Any]] = []
    with pytest.raises(PeftctlError, match=r"rows\.jsonl:1"):
        smoke(broken, listen=events.append)
    assert events[-1]["rows"][-1][::2] == ["train", "failed"]
    with pytest.raises(ModelError, match="architecture is not known"):
        smoke(mine(tmp_path, model={"name_or_path": "some/model"}))
    assert not list(nowhere.glob("peftctl-smoke*"))


def test_other_ways_to_run_do_not_go_with_it(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "smollm2-lora", "--smoke", "--resume"]) == 2
    assert "does not go with `--smoke`" in capsys.readouterr().err


def test_a_signal_ends_it_without_a_trace(tmp_path: Path, nowhere: Path):
    started = tiny_chat.start(tiny_chat.command("train", "methods/lora", "--smoke"), tmp_path, TMPDIR=str(nowhere))
    deadline = time.monotonic() + 60
    while not list(nowhere.glob("peftctl-smoke-*/run")) and time.monotonic() < deadline:
        time.sleep(0.05)
    started.terminate()
    _, told = started.communicate(timeout=60)
    assert (started.returncode, "in the stage `train`" in told) == (130, True), told
    assert not list(nowhere.glob("peftctl-smoke*"))
