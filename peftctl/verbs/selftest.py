"""`peftctl selftest`: a small run is killed again and again on the user's own disk, and must end as if it never was."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from peftctl import recipe as recipes
from peftctl.engine.tensor_file import WEIGHTS
from peftctl.errors import RunError, StorageError
from peftctl.models import tiny
from peftctl.models.architecture import architecture
from peftctl.recipe import Recipe
from peftctl.training import checkpoint
from peftctl.training.filesystem import guarded
from peftctl.training.signals import Stop
from peftctl.verbs import provenance
from peftctl.verbs.events import Listen, silent, ticker
from peftctl.verbs.made_up import made_up
from peftctl.verbs.mortal import live, one_thread
from peftctl.verbs.run_folder import RunFolder
from peftctl.verbs.signalled import polled
from peftctl.verbs.train import train

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS, INTERVAL = 24, 3
"""Of the run, and between its checkpoints."""


@dataclass
class Figures:
    """What came of it."""

    kills: int = 0
    runs: int = 0
    """That came to their end, each after some kills."""
    exact: int = 0
    """Of these, those whose adapter has the bits of the run that was never killed."""
    lost: int = 0
    """Checkpoints that a run had reported as saved, and that were not there after the kill."""
    damaged: int = 0
    """Checkpoints that were there after a kill, and not whole."""
    most_steps_lost: int = 0
    """Steps that had to be done again after a kill, at most."""
    failures: list[str] = field(default_factory=list)
    """Runs that ended with an error."""

    @property
    def flawless(self) -> bool:
        """Whether nothing was lost."""
        return not (self.lost or self.damaged or self.failures) and self.exact == self.runs


def selftest(
    kills: int = 100, *, folder: str | Path = ".", seed: int | None = None, listen: Listen = silent
) -> dict[str, Any]:
    """Kill a small run on the disk of `folder` at `kills` random moments, go on each time, and return the figures.

    Nothing is left behind, unless something was lost: then what is there stays, and StorageError says where.
    Raises RunError where processes cannot be forked.
    """
    if not hasattr(os, "fork"):
        raise RunError("selftest: this system cannot fork a process", "run it on Linux or macOS")
    seed = Random().randrange(2**32) if seed is None else seed
    chance, figures, started = Random(seed), Figures(), time.perf_counter()
    with Stop() as stop, one_thread():
        with guarded(Path(folder)):
            place = Path(tempfile.mkdtemp(prefix="peftctl-selftest-", dir=folder))
        try:
            recipe = small(place)
            wanted = straight(recipe, place)  # here: its forks need not import anything
            began = time.perf_counter()
            live(partial(train, recipe, output=place / "again"), place / "log.txt")
            whole = time.perf_counter() - began
            tell = ticker(listen, "killing")
            while figures.kills < kills or (place / "run").exists():
                polled(stop, f" after {figures.kills} kills", "run it again")
                last = figures.kills >= kills  # the last run may come to its end
                life(recipe, place, wanted, None if last else chance.uniform(0, whole), figures)
                tell(figures.kills, kills)
        finally:
            if figures.flawless:
                shutil.rmtree(place, ignore_errors=True)
    if not figures.flawless:
        told = f"{figures.lost} checkpoints lost, {figures.damaged} damaged, {figures.exact} of {figures.runs} exact"
        problem = "; ".join([told, *figures.failures[:3]])
        raise StorageError(f"{place}: after {figures.kills} kills: {problem}", "do not trust this disk with a run")
    found: dict[str, Any] = {**asdict(figures), "seed": seed, "seconds": round(time.perf_counter() - started, 1)}
    return {"path": str(Path(folder).absolute()), "steps": STEPS, "save_every": INTERVAL, **found}


def small(place: Path) -> Recipe:
    """The recipe of the run: a tiny random model, a few rows, dropout, evaluations, best checkpoints."""
    model = tiny.write(architecture(MODEL, None), place / "model", seed=0, layers=2, width=64)
    for name, rows in (("train", 30), ("eval", 6)):
        lines = [json.dumps(row) for row in made_up("messages", [], rows)]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return recipes.coerce(
        {
            "model": {"name_or_path": str(model), "device": "cpu", "dtype": "float32"},
            "method": {"type": "lora", "r": 4, "dropout": 0.3},
            "dataset": {"train": str(place / "train.jsonl"), "eval": str(place / "eval.jsonl"), "max_length": 256},
            "trainer": {
                "steps": STEPS,
                "batch_size": 4,
                "micro_batch_size": 2,
                "save_every": INTERVAL,
                "eval_every": 8,
                "learning_rate": 1e-2,
            },
            "output": "run",
        }
    )


def straight(recipe: Recipe, place: Path) -> str:
    """The digest of the adapter of a run that nobody kills."""
    train(recipe, output=place / "straight")
    return provenance.file_digest(place / "straight" / "adapter" / WEIGHTS)


def life(recipe: Recipe, place: Path, wanted: str, seconds: float | None, figures: Figures) -> None:
    """Go on with the run for so many seconds, or to its end, and look at what is on the disk then."""
    folder = RunFolder(place / "run")
    ended = live(partial(train, recipe, output=folder.path, resume=True), place / "log.txt", seconds)
    if ended is None:
        figures.kills += 1
        steps = events(folder.metrics)
        found, skipped = checkpoint.latest(folder.checkpoints)
        there = found.step if found else 0
        figures.lost += there < max(steps["saved"], default=0)
        figures.damaged += len(skipped)
        figures.most_steps_lost = max(figures.most_steps_lost, max(steps["step"], default=0) - there)
        return
    figures.runs += 1
    if ended != 0:
        figures.failures.append(last_words(place))
    elif provenance.file_digest(folder.adapter / WEIGHTS) == wanted:
        figures.exact += 1
        shutil.rmtree(folder.path)
        return
    folder.path.rename(place / f"failed-{figures.runs}")


def events(metrics: Path) -> dict[str, list[int]]:
    """The steps of what a killed run had told, by kind of event; its last line may be torn."""
    found: dict[str, list[int]] = {"step": [], "saved": []}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] in found:
            found[event["event"]].append(event["step"])
    return found


def last_words(place: Path) -> str:
    """The last line that the child printed."""
    lines = (place / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
