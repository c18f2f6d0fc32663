"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from peftctl.data.batches import Layout, Packing, Part, order, rows_per_epoch
from peftctl.data.encode import Encoded
from peftctl.engine.attach import live, trained
from peftctl.engine.method import Method
from peftctl.errors import Interrupted, NonFiniteError, NothingLearned, StorageError
from peftctl.evaluation.loss import add, looked_ahead, means, reduced
from peftctl.training import checkpoint, snapshot
from peftctl.training.memory import peak_memory
from peftctl.training.optimizer import build_optimizer, build_schedule
from peftctl.training.progress import Progress, marks
from peftctl.training.saver import Saver
from peftctl.training.signals import Stop
from peftctl.training.trainer import Trainer, peak_rate, total_steps


def train(
    model: nn.Module,
    method: Method,
    trainer: Trainer,
    rows: Sequence[Encoded],
    eval_rows: Mapping[str, Sequence[Encoded]],
    *,
    accelerator: Any,
    pad_id: int,
    seed: int,
    folder: Path,
    stop: Stop,
    log: Callable[[dict[str, Any]], None],
    write_adapter: Callable[[Path], None],
    parts: Sequence[Part] = (),
    packing: Packing | None = None,
    resume_from: checkpoint.Checkpoint | None = None,
) -> Progress:
    """Train the adapters attached to `model` on `rows`, in place, and return where it ended.

    The loss of a step is the sum over its rows divided by their weights, which are their numbers of trained tokens
    where the task does not say otherwise, over all micro-batches and processes. The order of rows is a function of
    (seed, epoch) and a checkpoint holds everything else that changes, so a resumed run is the uninterrupted one.
    Checkpoints go to `folder`.
    Raises, each after saving: Interrupted on a signal, NonFiniteError on a loss or gradient that is no number,
    NothingLearned when the adapter ends as it began. Raises StorageError when the disk refuses three saves in a row.
    """
    from accelerate.utils import gather_object, set_seed

    parts = parts or [Part(len(rows))]
    steps, per_epoch = total_steps(trainer, parts), math.ceil(rows_per_epoch(parts) / trainer.batch_size)
    eval_every, save_every = trainer.eval_every or per_epoch, trainer.save_every or per_epoch
    task = trainer.task
    layout = Layout(rows, trainer.micro_batch_size, pad_id, packing, task.collate)
    rank, world = accelerator.process_index, accelerator.num_processes
    progress = Progress()

    if trainer.gradient_checkpointing:
        recomputing: Any = model  # models of transformers and of diffusers know how
        if hasattr(recomputing, "gradient_checkpointing_enable"):
            recomputing.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            recomputing.enable_gradient_checkpointing()
    parameters = trained(model)
    names = {parameter: name for name, parameter in parameters.items()}
    rate = peak_rate(trainer, method)
    update = build_optimizer(trainer.optimizer, method.groups(parameters, rate), trainer.weight_decay)
    schedule = build_schedule(trainer.schedule, update, round(trainer.warmup * steps), steps)
    wrapped = accelerator.prepare_model(model)
    if trainer.compile:
        wrapped.compile(dynamic=True)
    wrapped.train()
    set_seed(seed + rank)  # dropout differs between processes
    if resume_from is not None:
        checkpoint.restore(resume_from, live(model), update, names, schedule)
        resume_from.restore_rng(rank)  # last: whatever is built draws random numbers
        progress = Progress(**resume_from.state["progress"])

    began = resume_from.state["began"] if resume_from is not None else marks(parameters)
    saver = Saver(log)

    def commit(progress: Progress, rng: list[Any]) -> Path:
        return checkpoint.save(
            folder,
            progress.step,
            trainable=live(model),
            optimizer=update,
            names=names,
            scheduler=schedule,
            state={"progress": progress._asdict(), "began": began},
            write_adapter=write_adapter,
            rng=rng,
        )

    def save(progress: Progress) -> bool:
        """Whether it is on the disk; one process writes, all know."""
        rng, saved = gather_object([snapshot.rng_state()]), True
        if accelerator.is_main_process:
            with stop.deferred():
                prune = partial(checkpoint.prune, folder, trainer.keep, progress.best_step)
                saved = saver.save(progress.step, partial(commit, progress, rng), prune)
        return bool(gather_object([saved])[0])

    def leave(progress: Progress, asked: str, saved: bool) -> NoReturn:
        """Stop as a signal asked."""
        what = f"stopped by {asked} after step {progress.step} of {steps}"
        if not saved:
            raise StorageError(f"{what}, not saved: the disk refused", "make room, then go on with `--resume`")
        raise Interrupted(f"{what}, saved", "go on with `--resume`")

    def due(progress: Progress) -> bool:
        """Whether an evaluation is."""
        at = progress.step % eval_every == 0 or progress.step == steps
        return bool(eval_rows) and at and progress.evaluated < progress.step

    def evaluate(progress: Progress) -> Progress:
        def poll() -> None:  # it may take long, and nothing of it is kept; several processes end it together
            if world == 1 and stop.requested:
                leave(progress, stop.requested, save(progress))

        found = {
            name: means(model, task, eval_set, trainer.micro_batch_size, pad_id, accelerator, poll)
            for name, eval_set in eval_rows.items()
        }
        first = next(iter(found.values()))  # the first set says what is best
        progress = progress.judged(first["loss"])
        told = {"step": progress.step, **first, "best": progress.best_step == progress.step}
        losses = {name: one["loss"] for name, one in found.items()}
        log({"event": "eval", **told, **({"losses": losses} if len(losses) > 1 else {})})
        return progress

    def over(progress: Progress) -> bool:
        early = trainer.early_stopping is not None and progress.evaluations_since_best >= trainer.early_stopping
        return progress.step == steps or early

    def closed(progress: Progress) -> Progress:
        """After what is due when a step is done: evaluate, save, stop."""
        before = progress
        progress = evaluate(progress) if due(progress) else progress
        asked = signalled(stop, accelerator)
        best = progress.best_step == progress.step
        if progress.step % save_every == 0 or best or over(progress) or asked:
            saved = save(progress)
            if best and not saved:  # there is no going back to it
                progress = progress._replace(best_loss=before.best_loss, best_step=before.best_step)
            if asked and not over(progress):
                leave(progress, asked, saved)
        return progress

    if due(progress):  # a signal came in the midst of it
        progress = closed(progress)
    planned, plan = -1, []
    while not over(progress):
        epoch, position = divmod(progress.step, per_epoch)
        if epoch != planned:
            planned, plan = epoch, order(parts, trainer.batch_size, seed, epoch)
        layout = replace(layout, rows=task.seen(rows, seed, progress.step))
        started = time.perf_counter()

        # forward and backward: a row weighs the same, whatever micro-batch it fell in
        chosen = [rows[i] for i in plan[position]]
        weight = sum(map(task.weight, chosen))
        micro_batches = layout.micro_batches(plan[position], rank, world)
        batches = (layout.batch(part, accelerator.device) for part in micro_batches)
        known = looked_ahead(model, task, batches, weight, accelerator)  # what losses take from the whole step, if any
        totals: dict[str, Tensor] = {}
        for index, part in enumerate(micro_batches):
            with nullcontext() if index + 1 == len(micro_batches) else accelerator.no_sync(wrapped):
                sums = task.sums(wrapped, layout.batch(part, accelerator.device) | known)
                # processes average their gradients, and every one of them adds the penalty
                accelerator.backward(sums["loss"] / weight * world + method.penalty(model) / len(micro_batches))
            add(totals, sums)
        figures = reduced(totals, weight, accelerator)
        mean = figures.pop("loss")
        norm = float(accelerator.clip_grad_norm_(parameters.values(), trainer.clip_norm or math.inf))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            what = f"step {progress.step + 1}: loss {mean:g}, gradient norm {norm:g}: not a finite number"
            told = f"; the state before it is saved in `{folder}`" if save(progress) else ""
            hint = "lower `trainer.learning_rate`, or use `model.dtype: bfloat16` where it is float16"
            raise NonFiniteError(f"{what}{told}", hint)
        if norm == 0 and progress.step == 0:
            hint = "`method.target_modules` must name modules between the inputs and the loss"
            raise NothingLearned("step 1: no gradient reached what is trained", hint)

        # update
        learning_rate = schedule.get_last_lr()[0]
        update.step()
        method.after_step(model, progress.step, steps)  # before the gradients go: AdaLoRA reads them
        schedule.step()
        update.zero_grad(set_to_none=True)
        tokens = sum(map(task.tokens, chosen))
        seconds = time.perf_counter() - started
        progress = progress._replace(
            step=progress.step + 1, tokens=progress.tokens + tokens, seconds=progress.seconds + seconds
        )
        log(
            {
                "event": "step",
                "step": progress.step,
                "steps": steps,
                "epoch": round(progress.step / per_epoch, 3),
                "loss": mean,
                **figures,
                "learning_rate": learning_rate,
                "gradient_norm": norm,
                "tokens": tokens,
                "trained_tokens": sum(row.trained for row in chosen),
                "seconds": seconds,
                "memory": peak_memory(),
            }
        )

        progress = closed(progress)

    if trainer.keep_best and progress.best_step is not None and progress.best_step != progress.step:
        checkpoint.restore_weights(checkpoint.at(folder, progress.best_step), live(model))
    if marks(parameters) == began:
        what = f"step {progress.step}: what was trained is as it was before the first step"
        raise NothingLearned(what, "raise `trainer.learning_rate`: small changes of bfloat16 weights are rounded away")
    return progress


def signalled(stop: Stop, accelerator: Any) -> str | None:
    """The signal that asked any of the processes to stop, so that all of them stop at the same step."""
    if accelerator.num_processes == 1:
        return stop.requested
    flag = torch.tensor(int(stop.requested is not None), device=accelerator.device)
    return (stop.requested or "a signal") if int(accelerator.reduce(flag, "sum")) else None
