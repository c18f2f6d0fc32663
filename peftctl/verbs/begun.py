"""What a run folder holds already: nothing, this run to go on with or finished, or something else, which is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from peftctl import recipe as recipes
from peftctl.engine.method import Method
from peftctl.errors import Problem, RunError
from peftctl.models import base as models
from peftctl.models.origin import origin
from peftctl.recipe import Recipe
from peftctl.training import checkpoint, storage
from peftctl.verbs import provenance
from peftctl.verbs.events import Listen, speaker
from peftctl.verbs.rows import Rows
from peftctl.verbs.run_folder import RunFolder
from peftctl.verbs.start import planned_record


def begin(
    folder: RunFolder, recipe: Recipe, base: models.Base, method: Method, rows: Rows, say: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """Write down what this run is, or find the checkpoint that an earlier one left."""
    if not folder.exists:
        record = {
            "started": provenance.now(),
            "seed": recipe.seed,
            "base": origin(base.folder, base.name),
            "data": rows.digests(),
            "rows": rows.counts(),
            "stop_ids": rows.train.stop_ids,
            "chat_template": provenance.digest(rows.train.chat_template or ""),
            "versions": provenance.versions(),
            "hardware": provenance.hardware(),
            **planned_record(method, recipe.method),
        }
        folder.write_json(folder.provenance, record)
        storage.replace_atomically(folder.recipe, recipes.dump(recipe).encode())
        return None
    if rows.digests() != folder.read_provenance().get("data"):
        raise RunError(f"{folder.path}: the data changed since this run began", "train anew with `--output`")
    folder.refuse_other_base(base.folder, base.name)
    found, skipped = checkpoint.latest(folder.checkpoints)
    for path, why in skipped:
        say(f"{path.name} is damaged and was skipped: {why}")
    say(f"going on after step {found.step}" if found else "no checkpoint yet: starting at the first step")
    return found


def compare(
    found: checkpoint.Checkpoint, folder: RunFolder, device: torch.device, strict: bool, listen: Listen
) -> None:
    """Say what has changed since `found` was written, so that the same bits cannot be promised.

    Raises RunError for it when `strict`.
    """
    changed = found.changed_since(device)
    if changed and strict:
        hint = "make it what it was, or leave out `--strict-resume`"
        raise RunError.of([Problem(f"{folder.path}: it cannot go on bit for bit: {each}", hint) for each in changed])
    for difference in changed:
        listen({"event": "warning", "text": f"going on, but not bit for bit: {difference}", "hint": None})


def refuse_foreign(folder: RunFolder, recipe: Recipe, resume: bool) -> None:
    """Raise RunError when the folder holds something else than this run, or this run without `resume`."""
    if not folder.exists:
        if not folder.empty:
            raise RunError(f"{folder.path}: exists and is no run of peftctl", "choose another folder with `--output`")
        return
    changed = recipes.differences(recipes.read_run(folder.path), recipe)
    state = "finished" if folder.finished else "an unfinished run is here"
    if changed:
        text = f"{folder.path}: {state}, with another recipe: {', '.join(f'`{key}`' for key in changed)}"
        raise RunError(text, "choose another folder with `--output`")
    if not folder.finished and not resume:
        raise RunError(f"{folder.path}: {state}", "go on with `--resume`, or choose another folder with `--output`")


def unchanged(folder: RunFolder, recipe: Recipe, rows: Rows, listen: Listen) -> dict[str, Any]:
    """A finished run of the same recipe and data is done; other data is refused."""
    if rows.digests() != folder.read_provenance().get("data"):
        text = f"{folder.path}: finished, with other data"
        raise RunError(text, "choose another folder with `--output`")
    speaker(listen)(f"{folder.path} is finished already, with this recipe and this data: nothing to do")
    return {"path": str(folder.path), "finished_before": True}
