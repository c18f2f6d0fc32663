"""A tiny base model, its data, recipes of it, and one finished run that no test may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_chat

import peftctl
from peftctl.cli import main
from peftctl.config.write import to_yaml
from peftctl.verbs.mortal import one_thread


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as the processes that a test starts have; no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with one_thread():
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write_base(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and held-out.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    tiny_chat.write_rows(folder / "train.jsonl", tiny_chat.chats(11))
    tiny_chat.write_rows(folder / "held-out.jsonl", tiny_chat.chats(7, start=40))
    return folder


@pytest.fixture(scope="session")
def made(base: Path, data: Path) -> Callable[..., Any]:
    """A recipe as a mapping, with the blocks given laid over it."""
    return lambda **blocks: tiny_chat.recipe(base, data / "train.jsonl", data / "held-out.jsonl", **blocks)


@pytest.fixture
def recipe_file(tmp_path: Path, made: Callable[..., Any]) -> Callable[..., Path]:
    """Writes a recipe into the test's folder."""

    def write(name: str = "recipe.yaml", **blocks: Any) -> Path:
        path = tmp_path / name
        path.write_text(to_yaml(made(**blocks)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, made: Callable[..., Any]) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with one_thread():
        peftctl.train(made(eval={"labels": tiny_chat.LABELS}), output=folder)
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs a command line in this process; gives exit code, standard output and standard error."""

    def run(*words: object) -> SimpleNamespace:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return run
