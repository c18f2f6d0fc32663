"""`peftctl plan`: what a run needs, before anything of it is loaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftctl import recipe as recipes
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.prepare import prepare
from peftctl.data.sources import listed
from peftctl.errors import PeftctlError
from peftctl.models import tiny
from peftctl.models.dummy import placed, tokenizer_folder
from peftctl.models.quiet import silent
from peftctl.planning import workload
from peftctl.planning.estimate import Estimate, estimate, refuse_unplanned
from peftctl.planning.speed import speed
from peftctl.planning.step import MicroBatch
from peftctl.planning.workload import Workload
from peftctl.recipe import Recipe, method_name
from peftctl.tasks.task import Task
from peftctl.verbs.events import Listen
from peftctl.verbs.events import silent as unheard
from peftctl.verbs.imitation import here
from peftctl.verbs.made_up import row
from peftctl.verbs.rows import Rows

LARGEST = 64 * 2**20
"""Bytes of files that are read for a plan."""

BYTES = 4
"""Of a token, as English has it."""

LONG = "and so it goes on, one after the other, "


def plan(
    recipe: Recipe | str | Path | Mapping[str, Any], *, fit: int | None = None, listen: Listen = unheard
) -> dict[str, Any]:
    """What a recipe needs: parameters, bytes by component, tokens, steps, FLOPs, seconds.

    Args:
        fit: bytes that it has to fit in; then `changes` are the cheapest that make it fit, with what each leaves.

    Raises:
        PeftctlError: whatever is wrong with the recipe, its data, its model or its method.
    """
    from peftctl.planning.fit import changes

    recipe = recipes.coerce(recipe)
    refuse_unplanned(recipe.trainer.task)  # before rows are made up that name no pictures
    load = workload_of(recipe)
    found = estimate(recipe, load.task, load.batch)
    record = described(recipe, load, found)
    if fit is not None:
        record["fit"] = {"bytes": fit, "fits": found.peak <= fit, "changes": []}
        if found.peak > fit:
            steps = changes(recipe, found, fit, lambda changed: again(changed, load))
            record["fit"]["changes"] = [
                {"set": change, "peak": one.peak, "total": one.memory.total} for change, one in steps
            ]
            record["fit"]["fits"] = bool(steps) and steps[-1][1].peak <= fit
    return record


def again(recipe: Recipe, load: Workload) -> Estimate:
    """The estimate of a changed recipe over the same rows."""
    lines = len(next(iter(load.batch.tensors.values())))
    wanted = recipe.trainer.micro_batch_size
    kept = {name: each[: max(1, wanted)] if lines > wanted else each for name, each in load.batch.tensors.items()}
    if "input_ids" in kept and kept["input_ids"].shape[1] > recipe.dataset.max_length:
        kept = {name: each[:, : recipe.dataset.max_length] if each.ndim == 2 else each for name, each in kept.items()}
    return estimate(recipe, load.task, MicroBatch.of(kept))


def workload_of(recipe: Recipe) -> Workload:
    """The workload by the rows, where they and the tokenizer are here; else by what the recipe says."""
    sources = [source.path for source in listed(recipe.dataset.train)]
    local = all(here(path) for path in sources)
    if local and sum(size(Path(path)) for path in sources) <= LARGEST:
        if tokenizer_folder(recipe.model) is not None:
            rows = Rows.read(recipe, silent)
            return workload.of_rows(recipe.trainer, rows.task, rows.train, recipe.seed)
        with suppress(PeftctlError):
            return of_bytes(recipe)
    task = recipe.trainer.task
    if task.head.classifies and not task.head.labels:
        task = task.of(task.head.with_labels(tuple(recipe.eval.labels) or ("no", "yes")))
    row = typical(recipe.dataset, task)
    return workload.of_length(recipe.trainer, task, row, None, None, f"every row taken to have {len(row):,} tokens")


def of_bytes(recipe: Recipe) -> Workload:
    """The workload where the rows are here and the tokenizer is not: by the bytes of the rows."""
    dataset = replace(recipe.dataset, max_length=BYTES * recipe.dataset.max_length)
    long = replace(recipe, model=placed(replace(recipe.model, load_format="dummy")), dataset=dataset)
    found = Rows.read(long, silent)
    load = workload.of_rows(recipe.trainer, found.task, found.train, recipe.seed)
    longest = min(-(-int(found.train.rows.lengths.max()) // BYTES), recipe.dataset.max_length)
    cut = {
        name: each[:, : -(-each.shape[1] // BYTES)] if each.ndim == 2 else each
        for name, each in load.batch.tensors.items()
    }
    return replace(
        load,
        batch=MicroBatch.of(cut),
        positions=load.positions / BYTES,
        tokens=found.train.ledger.tokens // BYTES,
        note=f"{BYTES} bytes taken for a token, {longest:,} tokens for the longest row: the tokenizer is not here",
    )


def size(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else Path().glob(str(path))
    return sum(file.stat().st_size for file in files if file.is_file())


def typical(dataset: Dataset, task: Task) -> Encoded:
    """A row of the task's as long as rows may be, nearly all of it trained."""
    made = long_row(dataset, task, LONG * (dataset.max_length // len(LONG) + 2), 0)
    with tempfile.TemporaryDirectory(prefix="peftctl-plan-") as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps(made) + "\n", encoding="utf-8")
        plain = replace(dataset, train=str(path), eval=None, on_long="truncate", columns={}, chat_template="tokenizer")
        return prepare(str(path), plain, tiny.tokenizer(), Path(), reading=task.reading, keep_parsed=True).rows[0]


def long_row(dataset: Dataset, task: Task, text: str, number: int) -> dict[str, Any]:
    """A made-up row that says `text` wherever it says much."""
    form = task.form if dataset.format == "auto" else dataset.format
    labels = task.head.labels or (("no", "yes") if task.head.classifies else ())
    asked = f"{number} {text}" if labels or form == "source_target" else f"What follows {number}?"
    made = row(form, asked, labels[number % len(labels)] if labels else text, number)
    if "rejected" in made:
        made["rejected"] = text
    return made


def described(recipe: Recipe, load: Workload, found: Estimate) -> dict[str, Any]:
    """The plan as data."""
    fast = speed(found.device, found.dtype)
    micro_batches = load.positions / max(1, load.batch.tokens)
    seconds = None if fast is None else fast.seconds(found.step) * micro_batches
    flops = found.flops_per_token * load.positions
    return {
        "model": recipe.model.name_or_path,
        "method": method_name(recipe.method),
        "device": str(found.device),
        "dtype": str(found.dtype).removeprefix("torch."),
        "quantization": recipe.model.quantization,
        "parameters": {"total": found.parameters, "trained": found.trained, "total_with_head_shared": found.tied},
        "memory": {**vars(found.memory), "total": found.memory.total},
        "peak": found.peak,
        "load_peak": found.load_peak,
        "merge_peak": found.merge_peak,
        "save_peak": found.save_peak,
        "adapter_bytes": found.adapter_bytes,
        "fast": found.step.fast,
        "data": workload.record(load),
        "flops": {
            "per_token": round(found.flops_per_token),
            "per_step": round(flops),
            "total": None if load.steps is None else round(flops * load.steps),
        },
        "seconds": {
            "per_step": seconds,
            "total": None if seconds is None or load.steps is None else seconds * load.steps,
        },
    }
