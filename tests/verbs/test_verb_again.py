"""A run folder met a second time: finished, unfinished, foreign, locked, damaged."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_chat
from toy_run import flip, steps_in

import peftctl
from peftctl import recipe as recipes
from peftctl.config.write import to_yaml
from peftctl.training import checkpoint, filesystem, snapshot, storage
from peftctl.verbs.run_folder import RunFolder

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def stopped(made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unfinished run: its process was killed after step 5, when steps 2, 3 and 4 were saved."""
    from peftctl.training.journal import Journal

    class Killed(BaseException):
        pass

    def write(self: Journal, event: Any) -> None:
        if event["event"] == "step" and event["step"] == 6:
            raise Killed
        real(self, event)

    real = Journal.write
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", write)
        with pytest.raises(Killed):
            peftctl.train(made(), output=tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_with_the_same_recipe_is_left_alone(finished: Path):
    before = tiny_chat.tree(finished)
    said: list[Any] = []
    result = peftctl.train(recipes.read_run(finished), output=finished, listen=said.append)
    assert result == {"path": str(finished), "finished_before": True}
    assert tiny_chat.tree(finished) == before
    assert any("nothing to do" in event.get("text", "") for event in said)
    assert peftctl.train(recipes.read_run(finished), output=finished, resume=True) == result


def test_a_finished_run_is_not_overwritten_by_another_recipe(finished: Path):
    before = tiny_chat.tree(finished)
    other = recipes.build(
        recipes.documents.read(finished / "recipe.yaml"), finished, ["method.r=2", "trainer.learning_rate=1e-3"]
    )
    for resume in (False, True):
        with pytest.raises(peftctl.PeftctlError) as caught:
            peftctl.train(other, output=finished, resume=resume)
        [(text, hint)] = caught.value.problems
        assert text.startswith(f"{finished}: ")
        assert "finished" in text
        assert "`method.r`, `trainer.learning_rate`" in text
        assert "--output" in str(hint)
    assert tiny_chat.tree(finished) == before


def test_other_data_of_the_same_name_is_refused(finished: Path, made: Callable[..., Any], tmp_path: Path):
    data = tiny_chat.write_rows(tmp_path / "rows.jsonl", tiny_chat.chats(5))
    wanted = made(dataset={"train": str(data)}, trainer={"steps": 2})
    peftctl.train(wanted, output=tmp_path / "run")
    before = tiny_chat.tree(tmp_path / "run")
    assert peftctl.train(wanted, output=tmp_path / "run")["finished_before"]
    tiny_chat.write_rows(data, tiny_chat.chats(5, start=1))
    with pytest.raises(peftctl.PeftctlError, match="other data") as caught:
        peftctl.train(wanted, output=tmp_path / "run")
    assert "--output" in str(caught.value.problems[0].hint)
    assert tiny_chat.tree(tmp_path / "run") == before


def test_an_unfinished_run_goes_on_with_resume_only(stopped: Path, made: Callable[..., Any], finished: Path):
    with pytest.raises(peftctl.PeftctlError, match="unfinished") as caught:
        peftctl.train(made(), output=stopped)
    assert "--resume" in str(caught.value.problems[0].hint)
    with pytest.raises(peftctl.PeftctlError, match=r"`trainer\.learning_rate`"):
        peftctl.train(made(trainer={"learning_rate": 1e-4}), output=stopped, resume=True)
    peftctl.train(made(), output=stopped, resume=True)
    assert (stopped / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
    assert [event["step"] for event in tiny_chat.steps(stopped)] == [1, 2, 3, 4, 5, 6]
    assert [e["loss"] for e in tiny_chat.steps(stopped)] == [e["loss"] for e in tiny_chat.steps(finished)]


def test_a_resume_with_other_data_is_refused(made: Callable[..., Any], tmp_path: Path, stopped: Path, data: Path):
    before = tiny_chat.tree(stopped)
    record = RunFolder(stopped).read_provenance()
    record["data"]["train"] = "0" * 64
    RunFolder(stopped).write_json(stopped / "provenance.json", record)
    with pytest.raises(peftctl.PeftctlError, match="the data changed") as caught:
        peftctl.train(made(), output=stopped, resume=True)
    assert "--output" in str(caught.value.problems[0].hint)
    after = tiny_chat.tree(stopped)
    assert {**after, "provenance.json": 0} == {**before, "provenance.json": 0}


def test_a_resume_on_another_base_is_refused(made: Callable[..., Any], tmp_path: Path, stopped: Path):
    record = RunFolder(stopped).read_provenance()
    record["base"]["weights"] = "0" * 64
    RunFolder(stopped).write_json(stopped / "provenance.json", record)
    with pytest.raises(peftctl.PeftctlError, match="not the base") as caught:
        peftctl.train(made(), output=stopped, resume=True)
    assert "weights" in str(caught.value.problems[0].hint)


def test_a_damaged_checkpoint_is_skipped_and_named(stopped: Path, made: Callable[..., Any], finished: Path):
    newest = checkpoint.at(stopped / "checkpoints", steps_in(stopped / "checkpoints")[-1])
    flip(newest / "optimizer.safetensors", byte=-5, bit=3)
    said: list[str] = []
    peftctl.train(
        made(), output=stopped, resume=True, listen=lambda event: said.append(str(event.get("text", event["event"])))
    )
    assert any(newest.name in line and "damaged" in line for line in said)
    assert any(line.startswith("going on after step") for line in said)
    assert f"going on after step {newest.name[-1]}" not in said
    assert (stopped / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()


def test_without_a_whole_checkpoint_it_starts_over(stopped: Path, made: Callable[..., Any], finished: Path):
    for step in steps_in(stopped / "checkpoints"):
        flip(checkpoint.at(stopped / "checkpoints", step) / "manifest.json", byte=4)
    said: list[str] = []
    peftctl.train(made(), output=stopped, resume=True, listen=lambda event: said.append(str(event.get("text"))))
    assert any("starting at the first step" in line for line in said)
    assert (stopped / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
    assert len(tiny_chat.steps(stopped)) == 6


def test_resume_of_nothing_starts_a_run(made: Callable[..., Any], tmp_path: Path, finished: Path):
    peftctl.train(made(), output=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()


def test_a_folder_that_is_no_run_is_left_alone(made: Callable[..., Any], tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("one")
    for resume in (False, True):
        with pytest.raises(peftctl.PeftctlError, match=r"thesis: exists and is no run of peftctl") as caught:
            peftctl.train(made(), output=tmp_path / "thesis", resume=resume)
        assert "--output" in str(caught.value.problems[0].hint)
    with pytest.raises(peftctl.PeftctlError, match=r"chapter\.txt: exists and is no run"):
        peftctl.train(made(), output=tmp_path / "thesis" / "chapter.txt")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    (tmp_path / "empty").mkdir()
    assert peftctl.train(made(trainer={"steps": 1}), output=tmp_path / "empty")["steps"] == 1


@pytest.mark.parametrize("output", ["/tmp/elsewhere", "../elsewhere", "a/../../b", "~/run"])
def test_a_recipe_writes_below_the_working_directory_only(
    output: str, recipe_file: Any, cli: Callable[..., SimpleNamespace]
):
    result = cli("train", recipe_file(output=output))
    assert result.code == 1
    assert "does not lie below the working directory" in result.err
    assert "--output" in result.err


def test_two_processes_never_write_to_one_run(made: Callable[..., Any], tmp_path: Path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "run.lock").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(peftctl.PeftctlError, match="another process is writing to this run"):
            peftctl.train(made(trainer={"steps": 1}), output=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
    peftctl.train(made(trainer={"steps": 1}), output=tmp_path / "run")


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(
    made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from peftctl.verbs.overview import Overview

    def tell(self: Overview, *arguments: Any, **options: Any) -> None:
        monkeypatch.undo()  # what comes next is the other process, while the first has its model ready
        peftctl.train(made(trainer={"steps": 1}), output=tmp_path / "run")
        before.update(tiny_chat.tree(tmp_path / "run"))

    before: dict[str, Any] = {}
    monkeypatch.setattr(Overview, "tell", tell)
    with pytest.raises(peftctl.PeftctlError, match="another process has just finished this run"):
        peftctl.train(made(trainer={"steps": 1}), output=tmp_path / "run")
    assert tiny_chat.tree(tmp_path / "run") == before


def test_a_strict_resume_refuses_what_cannot_be_bit_for_bit(
    stopped: Path, made: Callable[..., Any], finished: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
):
    (stopped.parent / "recipe.yaml").write_text(to_yaml(made()))
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_PACKAGES", ("torch", "pytest"))
        done = cli("train", stopped.parent / "recipe.yaml", "--output", stopped, "--strict-resume")
        assert done.code == 1
        assert "it cannot go on bit for bit: pytest: none then, " in done.err
        assert "leave out `--strict-resume`" in done.err
        assert not (stopped / "adapter").exists()
    peftctl.train(made(), output=stopped, strict_resume=True)
    assert (stopped / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()


@pytest.mark.parametrize("last", ["provenance.json", "recipe.yaml"])
def test_killed_before_the_first_step_it_begins_again(
    last: str, made: Callable[..., Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Found by a thousand kills: the provenance was there, the recipe was not, and the folder was nobody's."""
    own = filesystem.write

    class Killed(BaseException):
        pass

    def write(path: Path, chunks: Any) -> Any:
        if last in path.name:
            own(path, [b"half"])
            raise Killed
        return own(path, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", write)
        patch.setattr(storage, "remove", lambda path: None)
        with pytest.raises(Killed):
            peftctl.train(made(), output=tmp_path / "run")
    assert not RunFolder(tmp_path / "run").exists
    peftctl.train(made(), output=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
