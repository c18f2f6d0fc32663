from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from peftctl.cli import main


class Verb:
    """Stands for a verb: notes how it was called, tells `events`, then returns, raises or asks `result`."""

    def __init__(self, result: Any) -> None:
        self.result, self.events, self.calls = result, [], []

    def __call__(self, *arguments: Any, listen: Any = None, **options: Any) -> Any:
        self.calls.append((arguments, options))
        for event in self.events:
            listen(event)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result(*arguments) if callable(self.result) else self.result


@pytest.fixture
def verbs(monkeypatch):
    """Every verb, and what reads recipes, replaced: the command line alone is under test, and torch stays out."""
    found = SimpleNamespace(
        train=Verb({"path": "runs/x", "steps": 3}),
        evaluate=Verb({"path": "runs/x/eval.json"}),
        merge=Verb({"path": "merged"}),
        export=Verb({"path": "exported"}),
        generate=Verb("a llama"),
        describe=Verb([]),
        read=Verb("the recipe"),
        schema=Verb({"title": "recipe"}),
    )
    homes = {name: {name: getattr(found, name)} for name in ("train", "evaluate", "merge", "export", "generate")}
    homes = {f"peftctl.verbs.{name}": names for name, names in homes.items()}
    homes["peftctl.verbs.methods"] = {"describe": found.describe}
    homes["peftctl.recipe"] = {"read": found.read, "schema": found.schema}
    for name, names in homes.items():
        module = ModuleType(name)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture(autouse=True)
def nobody_watches(monkeypatch):
    """What a build server or a launcher sets in the environment, removed: it changes what is printed."""
    for name in ("CI", "RANK", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def peftctl(capsys, monkeypatch):
    """Runs a command line; gives exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str) -> SimpleNamespace:
        code = main(list(words))
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err, json=lambda: json.loads(said.out))

    return run
