"""What is due between two steps: evaluations, checkpoints, and an end where a signal asks for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from peftctl.data.encode import Encoded
from peftctl.errors import Interrupted, StorageError
from peftctl.evaluation.loss import means
from peftctl.training import checkpoint, snapshot
from peftctl.training.progress import Progress
from peftctl.training.saver import Saver
from peftctl.training.signals import Stop
from peftctl.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Between:
    """All of it for one run; every process takes part in everything."""

    model: nn.Module
    trainer: Trainer
    steps: int
    eval_every: int
    save_every: int
    eval_rows: Mapping[str, Sequence[Encoded]]
    pad_id: int
    accelerator: Any
    folder: Path
    """Of the checkpoints."""
    stop: Stop
    log: Callable[[dict[str, Any]], None]
    saver: Saver
    write: Callable[[Progress, list[Any]], Path]
    """Writes a checkpoint, of the random generators of all processes; raises StorageError."""

    def over(self, progress: Progress) -> bool:
        """Whether no step is left."""
        patience = self.trainer.early_stopping
        return progress.step == self.steps or (patience is not None and progress.evaluations_since_best >= patience)

    def due(self, progress: Progress) -> bool:
        """Whether an evaluation is: after a resume, too, when a signal came in the midst of it."""
        now = progress.step % self.eval_every == 0 or progress.step == self.steps
        return bool(self.eval_rows) and now and progress.evaluated < progress.step

    def close(self, progress: Progress) -> Progress:
        """Evaluate, save and stop, as far as that is due after a step; returns where the run is then."""
        before = progress
        progress = self.evaluate(progress) if self.due(progress) else progress
        asked, best = self.asked(), progress.best_step == progress.step
        if progress.step % self.save_every == 0 or best or self.over(progress) or asked:
            saved = self.save(progress)
            if best and not saved:  # there is no going back to it
                progress = progress._replace(best_loss=before.best_loss, best_step=before.best_step)
            if asked and not self.over(progress):
                self.leave(progress, asked, saved)
        return progress

    def evaluate(self, progress: Progress) -> Progress:
        """Measure the loss of every set; the first says what is best."""

        def poll() -> None:  # it may take long, and nothing of it is kept; several processes end it together
            if self.accelerator.num_processes == 1 and self.stop.requested:
                self.leave(progress, self.stop.requested, self.save(progress))

        trainer = self.trainer
        found = {
            name: means(self.model, trainer.task, rows, trainer.micro_batch_size, self.pad_id, self.accelerator, poll)
            for name, rows in self.eval_rows.items()
        }
        first = next(iter(found.values()))
        after = progress.judged(first["loss"])
        told = {"step": after.step, **first, "best": after.best_step == after.step}
        losses = {name: one["loss"] for name, one in found.items()}
        self.log({"event": "eval", **told, **({"losses": losses} if len(losses) > 1 else {})})
        return after

    def save(self, progress: Progress) -> bool:
        """Whether it is on the disk; one process writes, all know."""
        from accelerate.utils import gather_object

        rng, saved = gather_object([snapshot.rng_state()]), True
        if self.accelerator.is_main_process:
            with self.stop.deferred():
                prune = partial(checkpoint.prune, self.folder, self.trainer.keep, progress.best_step)
                saved = self.saver.save(progress.step, partial(self.write, progress, rng), prune)
        return bool(gather_object([saved])[0])

    def asked(self) -> str | None:
        """The signal that asked any of the processes to stop, so that all of them stop at the same step."""
        own = self.stop.requested
        if self.accelerator.num_processes == 1:
            return own
        flag = torch.tensor(int(own is not None), device=self.accelerator.device)
        return (own or "a signal") if int(self.accelerator.reduce(flag, "sum")) else None

    def leave(self, progress: Progress, asked: str, saved: bool) -> NoReturn:
        """Stop as a signal asked."""
        what = f"stopped by {asked} after step {progress.step} of {self.steps}"
        if not saved:
            raise StorageError(f"{what}, not saved: the disk refused", "make room, then go on with `--resume`")
        raise Interrupted(f"{what}, saved", "go on with `--resume`")
