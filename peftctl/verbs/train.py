"""`peftctl train`: from a recipe to an adapter in a run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftctl import recipe as recipes
from peftctl.data.batches import Packing, rows_per_epoch
from peftctl.engine.attach import trained
from peftctl.engine.disk import save
from peftctl.engine.method import Method
from peftctl.errors import RunError
from peftctl.exports.card import card, public
from peftctl.exports.diffusers_lora import obstacle, write_lora
from peftctl.models import base as models
from peftctl.models.allocator import keep_memory
from peftctl.models.dummy import placed
from peftctl.models.origin import ORIGIN, origin_bytes
from peftctl.recipe import Recipe
from peftctl.training import checkpoint, filesystem, storage
from peftctl.training.journal import Journal
from peftctl.training.loop import train as loop
from peftctl.training.packing import choose
from peftctl.training.progress import Progress
from peftctl.training.saver import short_of_room
from peftctl.training.signals import Stop
from peftctl.training.speed import once, quickened
from peftctl.verbs.begun import begin, compare, refuse_foreign, unchanged
from peftctl.verbs.events import Listen, silent, speaker
from peftctl.verbs.facts import facts_of
from peftctl.verbs.forecast import forecast
from peftctl.verbs.hints import Hints, memory_watched
from peftctl.verbs.outcome import outcome
from peftctl.verbs.overview import Overview
from peftctl.verbs.rows import Rows, refuse_longer
from peftctl.verbs.run_folder import RunFolder
from peftctl.verbs.sample import sample_of
from peftctl.verbs.signalled import BEFORE, meter, polled
from peftctl.verbs.start import keep_start, start


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    resume: bool = False,
    strict_resume: bool = False,
    dry_run: bool = False,
    listen: Listen = silent,
) -> dict[str, Any]:
    """Run a recipe and return what came out: `path` of the run folder, steps, loss, seconds, sizes.

    Args:
        recipe: a Recipe, the path of a recipe file, the name of a bundled one, or its content as a mapping.
        output: the run folder, instead of the recipe's.
        resume: go on from the newest checkpoint that verifies.
        strict_resume: the same, and refuse where what it depends on has changed, so that it cannot be bit for bit.
        dry_run: load everything, say what would happen, write nothing.

    Raises:
        PeftctlError: whatever is wrong with recipe, data, model or disk. A finished run is never overwritten.
        Interrupted: after a signal; what was done is saved.
    """
    started = time.perf_counter()
    resume = resume or strict_resume
    recipe = recipes.coerce(recipe)
    recipe = replace(recipe, model=placed(recipe.model))
    folder = RunFolder(recipes.run_folder(recipe, output))
    keep_memory()
    with Stop() as stop, ExitStack() as during:
        if not dry_run:
            refuse_foreign(folder, recipe, resume)
            folder.refuse_unwritable()
        accelerator = processes(recipe)
        if not accelerator.is_main_process:
            listen = silent
        rows = Rows.read(recipe, speaker(listen), meter(stop, listen))
        if folder.finished and not dry_run:
            return unchanged(folder, recipe, rows, listen)
        polled(stop, *BEFORE)
        foreseen = forecast(recipe, rows, speaker(listen)) if accelerator.is_main_process else None
        torch.manual_seed(recipe.seed)  # the start of a new head
        base = models.load(recipe.model, rows.task.head, say=speaker(listen))
        polled(stop, *BEFORE)
        torch.manual_seed(recipe.seed)  # the adapter's start
        again = folder if folder.exists and resume else None
        if resume and again is None:
            listen({"event": "note", "text": f"nothing to resume in {folder.path}: starting at the first step"})
        virtual = getattr(recipe.method, "num_virtual_tokens", 0)
        refuse_longer([rows.train, *rows.eval.values()], rows.task, base.model, virtual)
        wanted = rows.task.trains(recipe.method, base, speaker(listen))
        method = start(base, wanted, rows.task, sample_of(recipe, base, rows), again, accelerator, listen)
        say = speaker(listen)
        fast = during.enter_context(quickened(recipe.trainer, base.model, say))
        packing = choose(recipe.trainer, base.model, rows.train.rows, rows.train.parts, recipe.seed, say, bool(fast))
        plan = Overview.of(recipe, base, rows, folder.path, packing)
        plan.tell(listen, details=dry_run)
        if dry_run:
            return {"path": str(folder.path), **plan.record()}
        if plan.steps > math.ceil(rows_per_epoch(rows.train.parts) / recipe.trainer.batch_size):  # rows are seen again
            sets = [rows.task.rows(part, base) for part in (rows.train, *rows.eval.values())]
            once(fast, base.model, rows.task, sets, base.tokenizer.pad_token_id, meter(stop, listen), say)
        with folder.locked() if accelerator.is_main_process else nullcontext():
            progress = run(
                recipe, base, method, rows, packing, folder, resume, strict_resume, accelerator, stop, listen
            )
        seconds = time.perf_counter() - started
        return outcome(folder, plan, progress, seconds, foreseen, listen)


def run(
    recipe: Recipe,
    base: models.Base,
    method: Method,
    rows: Rows,
    packing: Packing | None,
    folder: RunFolder,
    resume: bool,
    strict: bool,
    accelerator: Any,
    stop: Stop,
    listen: Listen,
) -> Progress:
    """Train what is attached to `base`, in the run folder, and write the adapter at the end."""
    say = speaker(listen)
    found = None
    if accelerator.is_main_process:
        refuse_foreign(folder, recipe, resume)  # another process may have begun it while this one loaded its model
        if folder.finished:
            raise RunError(f"{folder.path}: another process has just finished this run", "nothing is left to do")
        found = begin(folder, recipe, base, method, rows, say)
        keep_start(method, folder, listen)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        found, _ = checkpoint.latest(folder.checkpoints) if resume else (None, [])
    if found is not None:
        compare(found, folder, accelerator.device, strict, listen)
    if room := short_of_room(folder.checkpoints, trained(base.model).values(), recipe.trainer.keep):
        listen({"event": "warning", "text": room, "hint": "make room, or choose another place with `--output`"})
    if base.pipeline is not None and (why := obstacle(method, type(base.model).__name__)):
        say(why)
    write = partial(write_adapter, recipe=recipe, base=base, rows=rows)
    done = found.step if found else 0
    main = accelerator.is_main_process  # the only one that may cut the file back to the step it goes on from
    with (
        memory_watched(recipe),
        Journal(folder.metrics, step=done, listener=Hints(recipe, listen)) if main else nullcontext() as journal,
    ):
        progress = loop(
            base.model,
            method,
            replace(recipe.trainer, task=rows.task),
            rows.task.rows(rows.train, base),
            {name: rows.task.rows(part, base) for name, part in rows.eval.items()},
            accelerator=accelerator,
            pad_id=base.tokenizer.pad_token_id,
            seed=recipe.seed,
            folder=folder.checkpoints,
            stop=stop,
            log=journal.write if journal else silent,
            write_adapter=write,
            parts=rows.train.parts,
            packing=packing,
            resume_from=found,
        )
    if accelerator.is_main_process:
        with storage.staged(folder.adapter) as staged:
            write(staged)
    accelerator.wait_for_everyone()
    return progress


def write_adapter(folder: Path, *, recipe: Recipe, base: models.Base, rows: Rows) -> None:
    """The adapter as a PEFT folder; beside it what it was trained on, the chat template and a model card."""
    save(base.model, folder)
    if base.pipeline is not None:
        write_lora(folder)
    filesystem.write(folder / ORIGIN, [origin_bytes(base.folder, public(base.name), rows.task.head.labels)])
    if rows.train.chat_template is not None:
        filesystem.write(folder / "chat_template.jinja", [rows.train.chat_template.encode()])
    filesystem.write(folder / "README.md", [card(facts_of(recipe, base.name, rows.counts(), rows.task.head)).encode()])


def processes(recipe: Recipe) -> Any:
    """accelerate's view of this process among its peers; its launchers' precision settings do not apply here."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=recipe.model.device == "cpu" or not torch.cuda.is_available(), mixed_precision="no")
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in plain:
        raise RunError(f"{accelerator.distributed_type.value}: not supported yet", "launch with plain data parallelism")
    return accelerator
