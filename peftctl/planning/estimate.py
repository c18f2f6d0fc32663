"""The estimate of a run: parameters, memory by component, work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from warnings import catch_warnings

import torch
from torch import Tensor, nn

from peftctl.engine.attach import adapters_of, trained
from peftctl.engine.disk import on_disk
from peftctl.errors import ModelError
from peftctl.models import output_head
from peftctl.models.architecture import architecture
from peftctl.models.base import Base
from peftctl.models.head import DIFFUSION, PICTURES
from peftctl.models.quantization import without_downloads
from peftctl.models.quiet import quiet
from peftctl.planning import optimizer
from peftctl.planning.blocks import whole_step
from peftctl.planning.content_free import bytes_of, content_free
from peftctl.planning.ledger import Ledger
from peftctl.planning.process import ALONE, FAST, PLAIN
from peftctl.planning.quantised import Quantised
from peftctl.planning.skeleton import dressed, network, planned_device, planned_dtype
from peftctl.planning.step import MicroBatch, Step, take
from peftctl.recipe import Recipe
from peftctl.tasks.task import Task


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when most is held; `libraries` and `slack` are a process's on a CPU."""

    weights: int
    """Of the base, those that are quantised without their scales."""
    quantisation: int
    """Scales of quantised weights."""
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    """What the forward keeps for the backward."""
    logits: int
    """Output head and loss."""
    workspace: int
    """What comes and goes meanwhile."""
    libraries: int
    slack: int
    """What the allocator holds and cannot use."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """What a run needs."""

    device: torch.device
    dtype: torch.dtype
    parameters: int
    """Of base and adapters; those stored in 4 bits count each."""
    trained: int
    tied: int | None
    """`parameters` where an output head that stands apart counts as shared with the embedding; None without one."""
    memory: Memory
    load_peak: int
    """Bytes while the base is read."""
    merge_peak: int
    save_peak: int
    adapter_bytes: int
    """On disk."""
    step: Step

    @property
    def peak(self) -> int:
        """Bytes: the most that the run holds at any time."""
        return max(self.memory.total, self.load_peak, self.save_peak)

    @property
    def flops_per_token(self) -> float:
        """Forward, backward and what is computed again, for each position."""
        return self.step.flops / max(1, self.step.tokens)


def refuse_unplanned(task: Task) -> None:
    """Raise ModelError for a task whose models no plan knows."""
    if task.head in (DIFFUSION, PICTURES):
        raise ModelError("plan: models that see or draw are not planned yet", "`peftctl train --smoke` tries them")


def estimate(recipe: Recipe, task: Task, batch: MicroBatch) -> Estimate:
    """What `recipe` needs whose widest micro-batch is `batch`; `task` knows its labels.

    Raises ModelError for an architecture that is not known here, AdapterError for a method that does not fit it.
    """
    refuse_unplanned(task)
    config = architecture(recipe.model.name_or_path, recipe.model.revision)
    trainer = recipe.trainer
    device = planned_device(recipe.model.device)
    dtype = planned_dtype(recipe.model.dtype, device)
    with content_free(device) as mode, quiet(), without_downloads(), catch_warnings(action="ignore"):
        made = network(recipe.model, task.head, config, dtype)
        split = apart(made)
        largest = max(p.numel() for p in made.parameters())
        method = dressed(made, task.trains(recipe.method, cast(Base, SimpleNamespace(model=made, new=()))))
        adapters = adapters_of(made, "default")
        total, parameters = counted(made), list(trained(made).values())
        with Ledger():  # which answers for AdaLoRA what is pruned
            disk = sum(t.numel() * t.element_size() for t in on_disk(adapters).values())
        weights, quantisation, bought = parts(made)
        take_one = partial(
            take,
            mode,
            made,
            method,
            task,
            batch,
            checkpointing=trainer.gradient_checkpointing
            if device.type == "cuda"
            else bool(trainer.gradient_checkpointing),
            accumulates=trainer.batch_size > trainer.micro_batch_size,
            fast=device.type if trainer.fast == "auto" and not trainer.compile else None,
            piece=output_head.PIECE.get(device.type, output_head.PIECE["cpu"]),
        )
        step = whole_step(made, take_one)
        gradients, state = bytes_of(parameters), optimizer.state_bytes(trainer.optimizer, parameters)
        update = optimizer.update_bytes(trainer.optimizer, parameters, device.type == "cuda")
    passing = step.held
    if gradients + update > sum(passing.values()):  # most is held while the weights are updated
        passing = {"gradients": gradients, "activations": 0, "logits": 0, "workspace": update}
    kept = weights + quantisation + bought
    habit = ALONE if device.type != "cpu" else FAST if step.fast else PLAIN
    most = sum(passing.values())
    memory = Memory(
        weights=weights,
        quantisation=quantisation,
        adapters=bought,
        optimizer=state,
        **passing,
        libraries=round(habit.libraries),
        slack=max(0, round(habit.passing(most, step.made) - most)),
    )
    # a tensor on its way is beside those that are there: on a GPU only where it is quantised there
    passed_on = 0 if device.type != "cpu" and recipe.model.quantization == "none" else largest * dtype.itemsize
    trained_count = sum(p.numel() for p in parameters)
    return Estimate(
        device=device,
        dtype=dtype,
        parameters=total,
        trained=trained_count,
        tied=total - split if split else None,
        memory=memory,
        load_peak=round(habit.libraries) + weights + quantisation + passed_on,
        merge_peak=round(habit.libraries) + bought + 3 * 4 * largest,
        save_peak=round(habit.libraries) + kept + state + disk,
        adapter_bytes=disk,
        step=step,
    )


def counted(made: nn.Module) -> int:
    """Parameters, those that are quantised as they were before."""
    packed = [module for module in made.modules() if isinstance(module, Quantised)]
    more = sum(module.in_features * module.out_features - module.weight.numel() for module in packed)
    return more + sum(p.numel() for p in made.parameters())


def parts(made: nn.Module) -> tuple[int, int, int]:
    """Bytes of the base's weights, of the scales of those that are quantised, and of all adapters."""
    own = [p for name, p in held(made) if ".adapters." not in f".{name}" and not name.endswith(".state")]
    scales = [p for name, p in held(made) if name.endswith(".state")]
    return bytes_of(own), bytes_of(scales), bytes_of([*made.parameters(), *made.buffers()]) - bytes_of([*own, *scales])


def held(made: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that stays, by name."""
    yield from made.named_parameters()
    yield from made.named_buffers()


def apart(made: Any) -> int:
    """Parameters of an output head that transformers would have tied to the embedding: see `models.dummy.untie`."""
    head, embedding = made.get_output_embeddings(), made.get_input_embeddings()
    stands = "d_model" in vars(made.config) and head is not None and head.weight is not embedding.weight
    return int(head.weight.numel()) if stands else 0
