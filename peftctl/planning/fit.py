"""Changes that make a run fit: those that cost nothing first, none that changes how many rows a step learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from peftctl.planning.estimate import Estimate
from peftctl.recipe import Recipe

SHORTEST = 128
"""Tokens below which rows are not cut."""

Change = tuple[str, Estimate]
"""A change as `train` takes it, and what the run needs with it and those before."""


def changes(recipe: Recipe, now: Estimate, fit: int, look: Callable[[Recipe], Estimate]) -> list[Change]:
    """The cheapest changes, in order, after the last of which it fits; all there are where it does not.

    One that saves nothing is left out.
    """
    done: list[Change] = []
    least = now.peak
    while least > fit:
        tried = ((text, changed, look(changed)) for text, changed in candidates(recipe, now.device.type))
        saving = next((one for one in tried if one[2].peak < 0.99 * least), None)
        if saving is None:
            return done
        text, recipe, found = saving
        least = found.peak
        # the same setting changed twice in a row is one change
        if done and done[-1][0].partition("=")[0] == text.partition("=")[0]:
            done.pop()
        done.append((text, found))
    return done


def candidates(recipe: Recipe, device: str) -> Iterator[tuple[str, Recipe]]:
    """What can be changed next on a device of this type, the cheapest first."""
    trainer, model, clashes = recipe.trainer, recipe.model, recipe.method.clashes
    if trainer.micro_batch_size > 1:
        size = min(trainer.micro_batch_size, trainer.batch_size) // 2
        text = f"trainer.micro_batch_size={max(1, size)}"
        yield text, replace(recipe, trainer=replace(trainer, micro_batch_size=max(1, size)))
    if not trainer.gradient_checkpointing and "trainer.gradient_checkpointing" not in clashes:
        changed = replace(trainer, gradient_checkpointing=True)
        yield "trainer.gradient_checkpointing=true", replace(recipe, trainer=changed)
    if trainer.optimizer == "adamw":
        yield "trainer.optimizer=adamw_8bit", replace(recipe, trainer=replace(trainer, optimizer="adamw_8bit"))
    if model.quantization == "none" and "model.quantization" not in clashes:
        yield "model.quantization=nf4", replace(recipe, model=replace(model, quantization="nf4"))
    if trainer.gradient_checkpointing is True and device == "cuda":
        changed = replace(trainer, gradient_checkpointing="offload")
        yield "trainer.gradient_checkpointing=offload", replace(recipe, trainer=changed)
    longest = recipe.dataset.max_length
    if longest // 2 >= SHORTEST:
        yield (
            f"dataset.max_length={longest // 2}",
            replace(recipe, dataset=replace(recipe.dataset, max_length=longest // 2)),
        )
