"""Every signal in every phase: what was saved is saved, the exit code says so, and going on ends with the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import peftctl
from peftctl.errors import PeftctlError
from peftctl.models import base as models
from peftctl.tasks.sft import SFT
from peftctl.training import between, filesystem
from peftctl.verbs import train as training
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.export import export
from peftctl.verbs.merge import merge
from peftctl.verbs.mortal import live
from peftctl.verbs.run_folder import RunFolder

ADAPTER = "adapter/adapter_model.safetensors"
SIGNALS = {
    "TERM": [signal.SIGTERM],
    "INT": [signal.SIGINT],
    "USR1": [signal.SIGUSR1],
    "TERM twice": [signal.SIGTERM] * 2,
    "INT twice": [signal.SIGINT] * 2,
}
FAST = ("TERM", "INT twice")


class Bell:
    """Sends its signals to this process the `at`-th time it is rung."""

    def __init__(self, signals: list[signal.Signals], at: int = 1) -> None:
        self.signals, self.left = signals, at

    def ring(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            for number in self.signals:
                os.kill(os.getpid(), number)

    def before(self, work: Callable[..., Any], when: Callable[..., bool] = lambda *given: True) -> Callable[..., Any]:
        """`work`, with a ring before it where `when` says so of what it is given."""

        def rung(*args: Any, **given: Any) -> Any:
            if when(*args):
                self.ring()
            return work(*args, **given)

        return rung

    def on(self, kind: str) -> Callable[[dict[str, Any]], None]:
        return lambda event: self.ring() if event["event"] == kind else None


def preparing(run: Callable[..., Any], bell: Bell) -> None:
    run(listen=bell.on("note"))


def loading(run: Callable[..., Any], bell: Bell) -> None:
    models.load = bell.before(models.load)
    run()


def stepping(run: Callable[..., Any], bell: Bell) -> None:
    bell.left = 3
    run(listen=bell.on("step"))


def accumulating(run: Callable[..., Any], bell: Bell) -> None:
    bell.left = 4  # in the midst of the second step: two micro-batches make one
    SFT.sums = bell.before(SFT.sums)  # type: ignore[method-assign]
    run()


def evaluating(run: Callable[..., Any], bell: Bell) -> None:
    bell.left = 2
    between.means = bell.before(between.means)
    run()


def saving(run: Callable[..., Any], bell: Bell) -> None:
    filesystem.write = bell.before(filesystem.write, lambda path, _: path.name == "state.json")
    run()


def ending(run: Callable[..., Any], bell: Bell) -> None:
    bell.left = 4  # after three checkpoints, the adapter itself
    training.write_adapter = bell.before(training.write_adapter)  # type: ignore[attr-defined]
    run()


TRAINING = {one.__name__: one for one in (preparing, loading, stepping, accumulating, evaluating, saving, ending)}


def code_of(work: Callable[[], object], log: Path) -> int | None:
    """The exit code that the command line would have."""

    def coded() -> None:
        try:
            work()
        except PeftctlError as error:
            os._exit(error.exit_code)

    return live(coded, log)


def slowly(cases: Any) -> list[Any]:
    """All pairs of a phase and signals; most are for the slow tests."""
    pairs = [(phase, words) for phase in cases for words in SIGNALS]
    return [pytest.param(*pair, marks=[] if pair[1] in FAST else pytest.mark.slow) for pair in pairs]


@pytest.fixture(scope="module")
def recipe(made: Callable[..., Any]) -> Any:
    return made(trainer={"eval_every": 3, "micro_batch_size": 2, "save_every": 2})


@pytest.fixture(scope="module")
def whole(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of the run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert live(partial(peftctl.train, recipe, output=folder), folder.parent / "log") == 0
    return (folder / ADAPTER).read_bytes()


@pytest.mark.parametrize(("phase", "words"), slowly(TRAINING))
def test_training(phase: str, words: str, recipe: Any, whole: bytes, tmp_path: Path):
    log, run, signals = tmp_path / "log", tmp_path / "run", SIGNALS[words]
    go = partial(peftctl.train, recipe, output=run, resume=True)
    code = code_of(lambda: TRAINING[phase](go, Bell(signals)), log)
    begun = phase not in ("preparing", "loading")
    if len(signals) == 2:
        assert code == 128 + signals[0], log.read_text()
    elif phase == "ending":  # nothing is left but to end it
        assert code == 0, log.read_text()
    else:
        assert code == (75 if begun else 130), log.read_text()
    assert run.exists() == begun
    if not RunFolder(run).finished:
        assert code_of(go, log) == 0, log.read_text()
    assert (run / ADAPTER).read_bytes() == whole


def exported(target: str, output: Path, listen: Any) -> None:
    export(target, output, format="safetensors", listen=listen)


@pytest.mark.parametrize(("verb", "words"), slowly(["eval", "merge", "export"]))
def test_the_other_verbs(verb: str, words: str, finished: Path, tmp_path: Path):
    log, output, signals = tmp_path / "log", tmp_path / "output", SIGNALS[words]
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    given = {"listen": Bell(signals).on("progress")}
    work = {
        "eval": partial(evaluate, str(finished), junit_file=output, **given),
        "merge": partial(merge, str(finished), output, **given),
        "export": partial(exported, str(finished), output, **given),
    }[verb]
    code = code_of(work, log)
    assert code == (130 if len(signals) == 1 else 128 + signals[0]), log.read_text()
    assert not output.exists()
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    if verb != "eval":
        again = {"merge": partial(merge, str(finished), output), "export": partial(exported, str(finished), output)}
        assert code_of(partial(again[verb], listen=lambda event: None), log) == 0, log.read_text()
        left = [path.name for path in tmp_path.iterdir()]
        assert sorted(left) == ["log", "output"]
