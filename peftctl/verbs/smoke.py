"""`peftctl train --smoke`: every stage of a recipe on a tiny model, on the CPU, without downloads."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from peftctl.engine.tensor_file import WEIGHTS
from peftctl.errors import GateFailed, Interrupted, NothingSaved, NotMergeable, PeftctlError, RunError
from peftctl.recipe import Recipe
from peftctl.training.signals import Stop
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.events import Event, Listen, silent, speaker
from peftctl.verbs.export import export
from peftctl.verbs.imitation import Imitation
from peftctl.verbs.merge import merge
from peftctl.verbs.run_folder import RunFolder
from peftctl.verbs.train import train


def smoke(recipe: Recipe, *, output: str | Path | None = None, listen: Listen = silent) -> dict[str, Any]:
    """Run every stage of `recipe` on a tiny random model of its architecture and return what came of each.

    Args:
        output: a folder to keep everything in, which must not exist yet; otherwise nothing is left behind.

    Raises:
        PeftctlError: whatever would stop the recipe, in the stage where it does; figures are not judged.
        Interrupted: after a signal.
    """
    kept = Path(output) if output else None
    if kept and kept.exists():
        raise RunError(f"{kept}: exists already", "choose another folder with `--output`")
    with Stop() as stop, tempfile.TemporaryDirectory(prefix="peftctl-smoke-") as temporary:
        if kept:
            kept.mkdir(parents=True)
        stages = Stages(stop)
        try:
            run_stages(recipe, kept or Path(temporary), stages, listen)
        finally:
            listen(
                {"event": "table", "title": "smoke", "columns": ["stage", "seconds", "outcome"], "rows": stages.rows}
            )
    return {"path": str(kept) if kept else None, "stages": stages.record}


def run_stages(recipe: Recipe, folder: Path, stages: Stages, listen: Listen) -> None:
    """Every stage, in `folder`."""
    run, again = folder / "run", folder / "again"
    with stages.stage("prepare") as tell:
        small = Imitation(folder, speaker(listen)).of(recipe)
        tell("tiny model and rows")
    with stages.stage("train") as tell:
        result = train(small, output=run, listen=warnings(listen))
        tell(f"{result['steps']} steps, {result['trainable_parameters']:,} parameters train")
    with stages.stage("resume") as tell:
        tell(resumed(small, run, again))
    with stages.stage("eval") as tell:
        tell(evaluated(small, run) if small.dataset.eval else "no `dataset.eval`")
    with stages.stage("merge") as tell:
        try:
            proof = merge(str(run), folder / "merged")["proof"]
            tell(f"logits within {proof['difference']:.1g}")
        except NotMergeable as error:
            tell(f"does not merge: {error.problems[0].text.rpartition(': ')[2]}")
    with stages.stage("export") as tell:
        tell(exported(run, folder / "exported"))


def resumed(recipe: Recipe, run: Path, again: Path) -> str:
    """Go on from the first checkpoint of `run` in the folder `again`: the same adapter must come out."""
    shutil.copytree(run, again)
    shutil.rmtree(RunFolder(again).adapter)
    checkpoints = sorted(path for path in RunFolder(again).checkpoints.iterdir() if path.is_dir())
    for path in checkpoints[1:]:
        shutil.rmtree(path)
    heard: list[str] = []
    train(recipe, output=again, resume=True, listen=lambda event: heard.append(event.get("text", "")))
    if "going on after step 1" not in heard:
        raise RunError("resume: its first checkpoint is not taken up", "report this")
    one, other = (load_file(RunFolder(path).adapter / WEIGHTS) for path in (run, again))
    if one.keys() != other.keys() or any(not torch.allclose(one[key], other[key], atol=1e-6) for key in one):
        raise RunError("resume: a run that goes on from its first checkpoint ends with another adapter", "report this")
    return f"from {checkpoints[0].name}, the same adapter"


def evaluated(recipe: Recipe, run: Path) -> str:
    """Measure, and say what was; a random model passes no gate, so they are computed and not judged."""
    try:
        result = evaluate(str(run))
    except GateFailed as error:
        result = error.result
    names = [name for name in next(iter(result["figures"].values())) if not name.endswith("rows")]
    gates = f"; {len(recipe.eval.gates)} gates not judged" if recipe.eval.gates else ""
    return ", ".join(names) + gates


def exported(run: Path, to: Path) -> str:
    """Write what the recipe asks for, or say why the method cannot be written so."""
    try:
        return str(export(str(run), to)["format"])
    except NotMergeable as error:
        return f"does not merge: {error.problems[0].text.rpartition(': ')[2]}"


def warnings(listen: Listen) -> Listen:
    """Passes on what a user should know of a stage; how it goes is not told."""

    def hear(event: Event) -> None:
        if event["event"] == "warning":
            listen(event)

    return hear


@dataclass
class Stages:
    """What was done, how long it took, and what came of it."""

    stop: Stop
    rows: list[list[str]] = field(default_factory=list)
    record: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """One stage; yields what takes its outcome. Raises NothingSaved after a signal."""
        started = time.perf_counter()
        outcome = ["done"]
        try:
            yield outcome.append
            if self.stop.requested:
                raise NothingSaved(f"stopped by {self.stop.requested}")  # a stage that does not look itself
        except Interrupted:
            outcome.append("stopped")
            hint = "nothing is left to go on from: start again"
            raise NothingSaved(f"stopped by a signal in the stage `{name}`", hint) from None
        except PeftctlError:
            outcome.append("failed")
            raise
        finally:
            seconds = time.perf_counter() - started
            self.rows.append([name, f"{seconds:.1f}", outcome[-1]])
            self.record.append({"stage": name, "seconds": round(seconds, 2), "outcome": outcome[-1]})
