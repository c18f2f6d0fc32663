"""`peftctl eval`: the figures of the base and of the adapter side by side, and the gates they must pass."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftctl.data.dataset import ONLY
from peftctl.engine.disk import fitting
from peftctl.engine.tensor_file import WEIGHTS
from peftctl.errors import GateFailed, Problem, RunError
from peftctl.evaluation import rows_file
from peftctl.evaluation.bootstrap import CONFIDENCE, DRAWS
from peftctl.evaluation.denoising import errors
from peftctl.evaluation.gate import BASE
from peftctl.evaluation.judge import judged
from peftctl.evaluation.junit import junit
from peftctl.evaluation.measure import measure
from peftctl.evaluation.metric import Seen
from peftctl.evaluation.report import markdown, tables
from peftctl.evaluation.sheet import Sheet, row_digest
from peftctl.methods import load
from peftctl.models import base as models
from peftctl.models.allocator import keep_memory
from peftctl.models.quiet import Say
from peftctl.recipe import Recipe
from peftctl.training import filesystem, storage
from peftctl.training.speed import quickened
from peftctl.verbs import provenance
from peftctl.verbs.asked import Asked, command, settings, unmeasured_gates
from peftctl.verbs.eval_record import (
    ADAPTER,
    confusions_of,
    figures_record,
    gate_record,
    samples_of,
    without_figure,
)
from peftctl.verbs.events import Listen, silent, speaker, ticker
from peftctl.verbs.past import earlier, model_of
from peftctl.verbs.rows import EvalSet, evaluation_rows, knowing, refuse_longer
from peftctl.verbs.signalled import stoppable
from peftctl.verbs.target import Target, open_target


@stoppable
def evaluate(
    target: str,
    *,
    overrides: Iterable[str] = (),
    adapter: str | None = None,
    asked: Asked | None = None,
    junit_file: Path | None = None,
    markdown_file: Path | None = None,
    listen: Listen = silent,
) -> dict[str, Any]:
    """Measure the base, and the adapter when there is one, on the recipe's evaluation rows, and judge its gates.

    Writes `eval.json` and the statistics of every row into the run folder, and the reports that are asked for; returns
    what stands in `eval.json`. Raises PeftctlError; GateFailed, whose `result` is that record, after all is written.
    """
    started = time.perf_counter()
    keep_memory()
    found = open_target(target, overrides, adapter)
    if found.recipe is None:
        raise RunError(f"{target}: an adapter alone does not say what to measure", "use its run folder or its recipe")
    found.check_base()
    say = speaker(listen)
    recipe = informed((asked or Asked()).of(found.recipe), found, say)
    record_settings = settings(recipe.eval)  # a library that is missing is told before the model takes its time
    torch.manual_seed(recipe.seed)  # a head that the base lacks starts the same each time
    base = models.load(found.model, recipe.trainer.task.head, say=say)
    sets = evaluation_rows(recipe, base.tokenizer, say)
    if recipe.eval.needs("pictures"):
        task = recipe.trainer.task
        sets = {name: one._replace(encoded=task.rows(one.prepared, base)) for name, one in sets.items()}
    task = recipe.trainer.task.judged
    sets = {name: one._replace(encoder=task.ready(one.encoder, base)) for name, one in sets.items()}
    virtual = getattr(recipe.method, "num_virtual_tokens", 0) if found.adapter is not None else 0
    refuse_longer([one.prepared for one in sets.values()], recipe.trainer.task, base.model, virtual)
    digests = {name: sorted(map(row_digest, one.prepared.parsed)) for name, one in sets.items()}
    gates = recipe.eval.gates if found.adapter is not None else {}
    past = earlier(gates, digests, partial(command, recipe))
    seen: dict[str, dict[str, Seen]] = {name: {} for name in sets}
    models_measured = [BASE]
    if found.adapter is not None:
        fitting(base.model, found.adapter)  # what does not fit is told before the base takes its time
    measured(BASE, base, sets, recipe, seen, listen)
    if found.adapter is not None:
        load(base.model, found.adapter)  # only now: full fine-tuning is written into the base itself
        measured(ADAPTER, base, sets, recipe, seen, listen)
        models_measured.append(ADAPTER)

    wanted = recipe.eval.wanted
    sheets = {name: Sheet.of(one.prepared.parsed, seen[name], wanted) for name, one in sets.items()}
    kept = rows_file.packed(sheets)
    for folder, sheets_there in past.items():
        for name, sheet in sheets.items():
            if name in sheets_there:
                sheet.statistics[folder] = sheets_there[name].statistics[model_of(sheets_there[name])]
    for key in unmeasured_gates(recipe):
        listen({"event": "warning", "text": f"eval.gates.{key}: not judged, those rows are not measured", "hint": None})
    if recipe.eval.gates and found.adapter is None:
        say("gates are for an adapter: there is none yet, so none is judged")
    for text in without_figure(sheets, models_measured[-1]):
        listen({"event": "warning", "text": text, "hint": None})
    verdicts = judged(sheets, gates, ADAPTER)
    for one in verdicts:
        if one.status == "passed, not certain":
            text = f"gate `{one.name}` is missed, within noise: {one.words}"
            listen({"event": "warning", "text": text, "hint": "more evaluation rows would tell"})

    confusions = confusions_of(recipe, seen)
    samples = samples_of(recipe, sets, seen)
    record = {
        "model": base.name,
        "adapter": str(found.adapter) if found.adapter else None,
        "adapter_sha256": provenance.file_digest(found.adapter / WEIGHTS) if found.adapter else None,
        "data": data_digests(sets),
        "evaluated": provenance.now(),
        "settings": {**record_settings, "confidence": CONFIDENCE, "draws": DRAWS},
        **figures_record(sheets, models_measured),
        "gates": [gate_record(one) for one in verdicts],
        **({"confusion": confusions} if confusions else {}),
        **({"samples": samples} if samples else {}),
    }
    path = where(found.recipe, found.folder.path if found.folder else None)
    filesystem.make_folder(path.parent)
    storage.replace_atomically(rows_path(path), kept)
    storage.replace_atomically(path, provenance.json_bytes(record))
    shown = tables(sheets, verdicts, confusions, samples, models_measured)
    for table in shown:
        listen({"event": "table", **table._asdict()})
    seconds = time.perf_counter() - started
    reports = {
        junit_file: junit(verdicts, f"peftctl eval {target}", record["evaluated"], seconds),
        markdown_file: markdown(shown).encode(),
    }
    for file, content in reports.items():
        if file is not None:
            filesystem.make_folder(file.parent)
            storage.replace_atomically(file, content)
    result = {"path": str(path), **record}
    failed = [one for one in verdicts if one.status == "failed"]
    if failed:
        raise GateFailed.after(result, [Problem(f"gate `{one.name}`: {one.words}") for one in failed])
    return result


def informed(recipe: Recipe, found: Target, say: Say) -> Recipe:
    """The recipe with what its task takes from the adapter or, where there is none, from the training rows."""
    task = recipe.trainer.task.of(found.head) if found.adapter is not None else knowing(recipe, say)
    chosen = list(task.head.labels) if "labels" in task.judged.measures else []
    measures = replace(recipe.eval, labels=recipe.eval.labels or chosen)
    return replace(recipe, trainer=replace(recipe.trainer, task=task), eval=measures)


def measured(
    name: str,
    base: models.Base,
    sets: Mapping[str, EvalSet],
    recipe: Recipe,
    seen: dict[str, dict[str, Seen]],
    listen: Listen,
) -> None:
    """Adds to `seen` what the model, as it is now, makes of every eval set."""
    pad, task = base.tokenizer.pad_token_id, recipe.trainer.task.judged
    base.model.requires_grad_(False)  # nothing is trained here, and the fast path takes no base that is
    with quickened(recipe.trainer, base.model, lambda why: None):
        for one, (_, encoder, rows, rejected, encoded) in sets.items():
            tick = ticker(listen, f"evaluating the {name}" + (f" on {one}" if one else ""))
            if recipe.eval.needs("pictures"):
                silence = [None] * len(rows)
                found = errors(base.model, task, encoded, pad, tick)
                seen[one][name] = Seen(errors=found, answers=silence, said=silence)
                continue
            seen[one][name] = measure(base.model, task, rows, encoder, recipe.eval, pad, tick, rejected)


def data_digests(sets: Mapping[str, EvalSet]) -> Any:
    """The digest of the rows, or of each set by name."""
    found = {name: one.prepared.digest for name, one in sets.items()}
    return found[ONLY] if list(found) == [ONLY] else found


def where(recipe: Recipe, run: Path | None) -> Path:
    """The file that the figures go to: in the run folder; beside where it would be when there is no run yet."""
    return run / "eval.json" if run else Path(f"{recipe.output}.base-eval.json")


def rows_path(path: Path) -> Path:
    """The file of the rows' statistics, beside that of the figures."""
    return path.with_name(rows_file.NAME if path.name == "eval.json" else path.stem + "-rows.npz")
