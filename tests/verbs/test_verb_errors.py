"""Whatever a person gets wrong: no traceback, `error: place: what`, the right exit code, nothing half-made left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_chat

from peftctl.training import filesystem
from peftctl.verbs.run_folder import RunFolder

Cli = Callable[..., SimpleNamespace]
COMMANDS = {
    "train": ("train", "{}"),
    "dry run": ("train", "{}", "--dry-run"),
    "resume": ("train", "{}", "--resume"),
    "eval": ("eval", "{}"),
    "merge": ("merge", "{}", "--output", "out"),
    "export": ("export", "{}", "--format", "peft", "--output", "out"),
    "export merged": ("export", "{}", "--format", "safetensors", "--output", "out"),
    "generate": ("generate", "{}", "hello"),
    "validate": ("validate", "{}"),
}
ALL = pytest.mark.parametrize("command", list(COMMANDS))
OF_RUNS = pytest.mark.parametrize("command", ["eval", "merge", "export", "export merged", "generate"])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(result: SimpleNamespace, *words: str, code: int = 1) -> None:
    """The result is an error as design.md wants it, with these words in it."""
    assert result.code == code, result.err
    assert result.out == ""
    first = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert first, result.err
    assert all(line.removeprefix("error: ").count(": ") >= 1 for line in first), result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
    assert not Path("out").exists()
    assert not Path("run").exists()


def said(command: str, target: str | Path) -> list[str]:
    return [word.format(target) for word in COMMANDS[command]]


@ALL
@pytest.mark.parametrize("target", ["nowhere.yaml", "no/such/place", "./nowhere"])
def test_a_wrong_path(command: str, target: str, cli: Cli):
    refused(cli(*said(command, target)), f"{target.removeprefix('./')}: ")


@ALL
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n# nothing\n", "empty"),
        (b"model: [1, 2\n", "bad.yaml:"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "bad.yaml"),
        (b"just words", "mapping"),
        (b"model: {nome_or_path: x}\n", "did you mean `name_or_path`?"),
    ],
)
def test_a_file_that_is_no_recipe(command: str, content: bytes, words: str, cli: Cli):
    Path("bad.yaml").write_bytes(content)
    refused(cli(*said(command, "bad.yaml")), "bad.yaml", words)


@pytest.mark.parametrize("command", ["train", "dry run", "resume", "eval"])
def test_a_wrong_key_on_the_command_line(command: str, recipe_file: Any, cli: Cli):
    path = recipe_file()
    refused(cli(*said(command, path), "trainer.stepz=3"), "`trainer.stepz", "did you mean `steps`?")
    refused(cli(*said(command, path), "trainer.steps=many"), "trainer.steps", "`many`")
    refused(cli(*said(command, path), "steps"), "steps")


@pytest.mark.parametrize("command", ["train", "dry run", "resume", "eval", "merge", "generate"])
def test_a_folder_without_a_model(command: str, recipe_file: Any, cli: Cli, tmp_path: Path, finished: Path):
    (tmp_path / "hollow").mkdir()
    if command in ("merge", "generate"):
        shutil.copytree(finished / "adapter", "adapter")
        config = json.loads(Path("adapter/adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "hollow")
        Path("adapter/adapter_config.json").write_text(json.dumps(config))
        refused(cli(*said(command, "adapter")), "hollow", "config.json")
    else:
        refused(cli(*said(command, recipe_file(model={"name_or_path": "hollow"}))), "hollow: ")


@OF_RUNS
def test_a_folder_that_is_no_run(command: str, cli: Cli, base: Path):
    Path("photos").mkdir()
    refused(cli(*said(command, "photos")), "photos: no run and no adapter is here")
    refused(cli(*said(command, base)), f"{base}: no run and no adapter is here")


@OF_RUNS
def test_an_unfinished_run(command: str, cli: Cli, finished: Path):
    shutil.copytree(finished, "half")
    shutil.rmtree("half/adapter")
    refused(cli(*said(command, "half")), "half: this run is not finished", "--resume")


@OF_RUNS
@pytest.mark.parametrize("damage", ["short", "config", "nan", "missing"])
def test_a_damaged_adapter(command: str, damage: str, cli: Cli, finished: Path):
    shutil.copytree(finished, "broken")
    weights, config = Path("broken/adapter/adapter_model.safetensors"), Path("broken/adapter/adapter_config.json")
    if damage == "short":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif damage == "config":
        config.write_text("{")
    elif damage == "nan":
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\xc0\x7f")
    else:
        weights.unlink()
    refused(cli(*said(command, "broken")), "broken/adapter")
    assert not Path("broken/eval.json").exists()


@OF_RUNS
@pytest.mark.parametrize("name", ["recipe.yaml", "provenance.json"])
def test_a_damaged_record(command: str, name: str, cli: Cli, finished: Path):
    shutil.copytree(finished, "broken")
    Path("broken", name).write_bytes(b"[\x00")
    refused(cli(*said(command, "broken")), f"broken/{name}")


@pytest.mark.parametrize("command", ["eval", "merge", "export merged", "generate"])
def test_an_adapter_of_another_base(command: str, cli: Cli, finished: Path, tmp_path: Path):
    other = tiny_chat.write_base(tmp_path / "other", seed=9)
    shutil.copytree(finished, "moved")
    recipe = Path("moved/recipe.yaml")
    then = json.loads(Path("moved/provenance.json").read_text())["base"]["name"]
    recipe.write_text(recipe.read_text().replace(f"name_or_path: {then}", f"name_or_path: {other}"))
    refused(cli(*said(command, "moved")), "other: not the base that `moved` was trained on", "weights")
    assert not Path("moved/eval.json").exists()


def test_no_place_to_write(cli: Cli, finished: Path, recipe_file: Any):
    Path("file").write_text("not a folder")
    below = "file/out"
    early = cli("train", recipe_file(), "--output", below)
    refused(early, "file: a file is in the way of a folder", "--output")
    assert "float32" not in early.err  # said before the model was loaded
    refused(cli("merge", finished, "--output", below), "error: file: ")
    refused(cli("export", finished, "--format", "peft", "--output", below), "error: file: ")
    shutil.copytree(finished, "copy")
    Path("copy/eval.json").mkdir()
    refused(cli("eval", "copy"), "copy/eval.json")


def test_what_exists_is_not_overwritten(cli: Cli, finished: Path):
    for words in (("merge",), ("export", "--format", "peft"), ("export", "--format", "safetensors")):
        Path("there").mkdir(exist_ok=True)
        Path("there/mine.txt").write_text("mine")
        refused(cli(words[0], finished, *words[1:], "--output", "there"), "there: exists already")
        assert [path.name for path in Path("there").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("command", ["train", "merge", "eval"])
def test_the_disk_refuses(
    command: str, number: int, cli: Cli, finished: Path, recipe_file: Any, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: Path, chunks: Any) -> Any:
        with filesystem.guarded(path):
            raise OSError(number, os.strerror(number), str(path))

    target = recipe_file()
    if command != "train":
        target = Path(shutil.copytree(finished, "copy"))
    monkeypatch.setattr(filesystem, "write", refuse)
    monkeypatch.setattr("peftctl.training.storage.write", refuse)
    result = cli(*said(command, target))
    reason = {errno.ENOSPC: "no space left", errno.EROFS: "read-only", errno.EACCES: "no permission"}[number]
    assert not RunFolder("run").finished
    shutil.rmtree("run", ignore_errors=True)
    refused(result, reason)
    assert not list(Path.cwd().rglob(".tmp-*"))
    assert not Path("copy/eval.json").exists()


@pytest.mark.parametrize("size", [300, 2_000, 10_000, 40_000])
@pytest.mark.parametrize("command", ["train", "merge", "export", "eval"])
def test_files_that_may_not_grow(command: str, size: int, cli: Cli, finished: Path, recipe_file: Any):
    """A real refusal of the system, at whatever is written first that is larger, whoever writes it."""
    import resource

    target = recipe_file() if command == "train" else Path(shutil.copytree(finished, "copy"))
    before = tiny_chat.tree(finished)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        result = cli(*said(command, target))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if result.code == 0:  # nothing was that large
        assert size > 300
        return
    assert not RunFolder("run").finished
    shutil.rmtree("run", ignore_errors=True)
    refused(result, "error: ")
    assert not list(Path.cwd().rglob(".tmp-*"))
    assert tiny_chat.tree(finished) == before


def test_an_adapter_says_itself_when_its_base_is_another(finished: Path, tmp_path: Path, cli: Cli):
    sibling = tiny_chat.write_base(tmp_path / "sibling", seed=5)
    shutil.copytree(finished / "adapter", tmp_path / "alone")
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    changed = config | {"base_model_name_or_path": str(sibling)}
    (tmp_path / "alone" / "adapter_config.json").write_text(json.dumps(changed))
    told = f"{sibling}: not the base that `alone` was trained on\n  hint: its weights differ\n"
    shown = cli("merge", "alone", "--output", "out")
    assert (shown.code, shown.err) == (1, f"error: {told}")
    shown = cli("merge", "alone", "--base", str(sibling), "--output", "asked-for")
    assert shown.code == 0
    assert f"warning: {told}" in shown.err
    (tmp_path / "alone" / "peftctl.json").unlink()  # then nobody can know
    assert cli("merge", "alone", "--output", "out").code == 0
