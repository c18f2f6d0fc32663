"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftctl.data.batches import Layout, Packing, Part, order, rows_per_epoch
from peftctl.data.encode import Encoded
from peftctl.engine.attach import live, trained
from peftctl.engine.method import Method
from peftctl.errors import NonFiniteError, NothingLearned
from peftctl.evaluation.loss import add, looked_ahead, reduced
from peftctl.models.recomputing import recompute
from peftctl.training import checkpoint
from peftctl.training.between import Between
from peftctl.training.memory import peak_memory
from peftctl.training.offload import Offload
from peftctl.training.optimizer import build_optimizer, build_schedule
from peftctl.training.progress import Progress, marks, resumed
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
    from accelerate.utils import set_seed

    parts = parts or [Part(len(rows))]
    steps, per_epoch = total_steps(trainer, parts), math.ceil(rows_per_epoch(parts) / trainer.batch_size)
    task = trainer.task
    layout = Layout(rows, trainer.micro_batch_size, pad_id, packing, task.collate)
    rank, world = accelerator.process_index, accelerator.num_processes
    progress = Progress()

    if trainer.gradient_checkpointing:
        recompute(model)
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
        progress = resumed(resume_from)

    began = marks(parameters) if resume_from is None else resume_from.state.get("began")

    def write(progress: Progress, rng: list[Any]) -> Path:
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

    between = Between(
        model=model,
        trainer=trainer,
        steps=steps,
        eval_every=trainer.eval_every or per_epoch,
        save_every=trainer.save_every or per_epoch,
        eval_rows=eval_rows,
        pad_id=pad_id,
        accelerator=accelerator,
        folder=folder,
        stop=stop,
        log=log,
        saver=Saver(log),
        write=write,
    )
    if between.due(progress):
        progress = between.close(progress)
    planned, plan = -1, []
    while not between.over(progress):
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
                with Offload() if trainer.gradient_checkpointing == "offload" else nullcontext():
                    sums = task.sums(wrapped, layout.batch(part, accelerator.device) | known)
                # processes average their gradients, and every one of them adds the penalty
                accelerator.backward(sums["loss"] / weight * world + method.penalty(model) / len(micro_batches))
            add(totals, sums)
        figures = reduced(totals, weight, accelerator)
        mean = figures.pop("loss")
        norm = float(accelerator.clip_grad_norm_(parameters.values(), trainer.clip_norm or math.inf))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            what = f"step {progress.step + 1}: loss {mean:g}, gradient norm {norm:g}: not a finite number"
            told = f"; the state before it is saved in `{folder}`" if between.save(progress) else ""
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

        progress = between.close(progress)

    if trainer.keep_best and progress.best_step is not None and progress.best_step != progress.step:
        checkpoint.restore_weights(checkpoint.at(folder, progress.best_step), live(model))
    if marks(parameters) == began:
        what = f"step {progress.step}: what was trained is as it was before the first step"
        raise NothingLearned(what, "raise `trainer.learning_rate`: small changes of bfloat16 weights are rounded away")
    return progress
