"""Advice while training, each piece once, and only when the figures call for it. docs/tuning.md says more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import fmean, variance

from peftctl.errors import OutOfMemory
from peftctl.recipe import Recipe
from peftctl.training.trainer import peak_rate
from peftctl.verbs.events import Event, Listen

SHORTEST = 24
"""Steps after the warmup before anything can be said about a loss."""


class Hints:
    """Passes the events of a run on and adds a `warning` where they show that something is surely unwanted."""

    def __init__(self, recipe: Recipe, listen: Listen) -> None:
        self.recipe, self.listen = recipe, listen
        self.losses: list[float] = []
        self.since_evaluation: list[float] = []
        self.evaluations: list[tuple[int, float, float]] = []
        """Step, evaluation loss, mean training loss since the one before."""
        self.told: set[str] = set()

    def __call__(self, event: Event) -> None:
        self.listen(event)
        if event["event"] == "step":
            self.after_step(event)
        elif event["event"] == "eval":
            self.after_evaluation(event)

    def say(self, text: str, hint: str) -> None:
        self.listen({"event": "warning", "text": text, "hint": hint})

    def after_step(self, event: Event) -> None:
        """Looks at the loss after a quarter, after half and at the end of the run."""
        step, steps = event["step"], event["steps"]
        self.since_evaluation.append(event["loss"])
        if step > round(self.recipe.trainer.warmup * steps):
            self.losses.append(event["loss"])
        if not self.recipe.trainer.task.steady:
            return
        due = step in (steps // 4, steps // 2, steps) and len(self.losses) >= SHORTEST
        if due and "flat" not in self.told and flat(self.losses, step == steps):
            self.told.add("flat")
            third = len(self.losses) // 3
            before, after = fmean(self.losses[:third]), fmean(self.losses[-third:])
            self.say(
                f"the loss does not fall: {before:.3g} at first, {after:.3g} now, after {step} steps",
                f"raise {self.now('trainer.learning_rate')} or {self.now('method.r')}; "
                "`peftctl data` shows what is trained",
            )

    def after_evaluation(self, event: Event) -> None:
        """Looks whether evaluation has risen twice in a row while training went on to fall."""
        if self.since_evaluation:
            self.evaluations.append((event["step"], event["loss"], fmean(self.since_evaluation)))
            self.since_evaluation = []
        if "overfit" in self.told or not overfits(self.evaluations):
            return
        self.told.add("overfit")
        at, best, _ = min(self.evaluations, key=lambda one: one[1])
        kept = "the best adapter is kept" if self.recipe.trainer.keep_best else "`trainer.keep_best` would keep it"
        self.say(
            f"evaluation gets worse while training goes on to fall: loss {event['loss']:.3g}, best {best:.3g} "
            f"at step {at} ({kept})",
            f"raise {self.now('method.dropout')} or {self.now('trainer.weight_decay')}, lower {self.now('method.r')}, "
            "or train for fewer epochs",
        )

    def now(self, key: str) -> str:
        """The recipe's key with its value, where it has one."""
        block, _, name = key.partition(".")
        value = getattr(getattr(self.recipe, block), name, None)
        if name == "learning_rate":
            value = peak_rate(self.recipe.trainer, self.recipe.method)
        return f"`{key}`" if value is None else f"`{key}` ({value:g} now)"


def flat(losses: list[float], at_the_end: bool) -> bool:
    """Whether the loss does not fall, by the means of the first and the last third of `losses`.

    At the end of a run it is enough that no fall can be told from chance (two standard errors); before, it must be sure
    that none above 2 % is hidden in the noise.
    """
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    fall = fmean(first) - fmean(last)
    error = math.sqrt((variance(first) + variance(last)) / third)
    return fall < 2 * error if at_the_end else fall + 2 * error < 0.02 * fmean(first)


def overfits(evaluations: list[tuple[int, float, float]]) -> bool:
    """Whether the last two evaluations each rose, to 1 % above the best, with training loss falling each time."""
    best = min((loss for _, loss, _ in evaluations), default=0.0)
    last = evaluations[-3:]
    return len(last) == 3 and last[-1][1] > 1.01 * best and all(b[1] > a[1] and b[2] < a[2] for a, b in pairwise(last))


@contextmanager
def memory_watched(recipe: Recipe) -> Iterator[None]:
    """Whatever torch or its allocator says when there is no memory left becomes OutOfMemory."""
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        what = (str(error).strip().splitlines() or ["no memory left"])[0][:200]
        raise OutOfMemory(f"out of memory in training: {what}", smaller(recipe)) from error


def smaller(recipe: Recipe) -> str:
    """The cheapest change that takes less memory: those that leave the result as it is come first."""
    trainer, clashes = recipe.trainer, recipe.method.clashes
    if trainer.micro_batch_size > 1:
        return f"`trainer.micro_batch_size={trainer.micro_batch_size // 2}`: the result is the same"
    if not trainer.gradient_checkpointing and "trainer.gradient_checkpointing" not in clashes:
        return "`trainer.gradient_checkpointing=true`: a quarter slower, the result is the same"
    if recipe.model.quantization == "none" and "model.quantization" not in clashes:
        return "`model.quantization=nf4`: a quarter of the memory for the weights"
    if trainer.optimizer == "adamw":
        return "`trainer.optimizer=adamw_8bit`: a quarter of the memory for the optimizer"
    return f"a smaller `dataset.max_length` ({recipe.dataset.max_length:,} tokens now), or a smaller model"
