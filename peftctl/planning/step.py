"""One micro-batch of a run, forward and backward, without content: what it holds and what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from peftctl.engine.attach import trained
from peftctl.engine.method import Method
from peftctl.engine.sample import IGNORED
from peftctl.models import output_head
from peftctl.models.recomputing import recompute
from peftctl.planning.ledger import Ledger
from peftctl.planning.quick import quickened
from peftctl.tasks.task import Task
from peftctl.training.offload import worth_it


@dataclass(frozen=True)
class MicroBatch:
    """What one forward reads, and how much of it is trained, which nobody can tell from shapes."""

    tensors: Mapping[str, Tensor]
    trained: int
    """Labels that are trained."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> MicroBatch:
        """A batch of a task's, with its content."""
        labels = tensors.get("labels")
        return cls(tensors, 0 if labels is None else int((labels != IGNORED).sum()))

    @property
    def share(self) -> float:
        """Of the labels, those that are trained."""
        return self.trained / max(1, self.tensors["labels"].numel()) if "labels" in self.tensors else 1.0

    @property
    def a_row(self) -> int:
        """Labels of a row that are trained."""
        return -(-self.trained // max(1, len(self.tensors["labels"]))) if "labels" in self.tensors else 1

    @property
    def tokens(self) -> int:
        """Positions that are computed, padding included."""
        return sum(each.numel() for name, each in self.tensors.items() if name in ("input_ids", "decoder_input_ids"))


@dataclass(frozen=True)
class Step:
    """What one micro-batch takes beside the weights, and what it computes."""

    moments: Mapping[str, Mapping[str, float]]
    """Bytes by heading at the moments when most is held (`ledger.Ledger.moments`): gradients; activations that the
    forward keeps for the backward; logits, of output head and loss; workspace, which comes and goes."""
    flops: float
    moved: float
    """Bytes that operations other than products of matrices read and write."""
    calls: float
    """Operations."""
    made: float
    """Bytes of all tensors that come, whether or not they stay."""
    tokens: int
    """Positions that the model computes, padding included."""
    fast: bool
    """Whether by the fast path."""

    @property
    def held(self) -> dict[str, int]:
        """Bytes by heading when most is held of all."""
        most = max(self.moments.values(), key=lambda moment: sum(moment.values()), default={})
        return {name: round(most.get(name, 0)) for name in HEADINGS}


HEADINGS = ("gradients", "activations", "logits", "workspace")


def deeper(shallow: Step, deep: Step, blocks: float) -> Step:
    """The step of a model that is deeper still: `blocks` times as much deeper than `deep` as that is than `shallow`."""

    def along(a: float, b: float) -> float:
        return max(0.0, b + (b - a) * blocks)

    moments = {
        phase: {
            name: along(shallow.moments.get(phase, {}).get(name, 0), deep.moments.get(phase, {}).get(name, 0))
            for name in HEADINGS
        }
        for phase in deep.moments.keys() & shallow.moments.keys()
    }
    return Step(
        moments,
        along(shallow.flops, deep.flops),
        along(shallow.moved, deep.moved),
        along(shallow.calls, deep.calls),
        along(shallow.made, deep.made),
        deep.tokens,
        deep.fast,
    )


def take(
    mode: FakeTensorMode,
    model: Any,
    method: Method,
    task: Task,
    batch: MicroBatch,
    *,
    checkpointing: bool | str,
    accumulates: bool,
    fast: str | None,
    piece: int,
) -> Step:
    """Take the step.

    Args:
        checkpointing: see `trainer.gradient_checkpointing`; `offload` for a GPU alone.
        accumulates: gradients of another are there already.
        fast: by the fast path of a device of this kind, where it fits; None as transformers does.
        piece: elements of the logits that are held at once.
    """
    labels = batch.tensors.get("labels")
    width = labels.shape[1] if labels is not None and labels.ndim == 2 else 0
    ledger: Any = Ledger(batch.share, batch.a_row, width)
    device = next(model.parameters()).device
    inputs = {name: mode.from_tensor(tensor).to(device) for name, tensor in batch.tensors.items()}
    parameters = trained(model).values()
    hooks = [*headings(model, ledger), *(booked(parameter, ledger) for parameter in parameters)]
    if checkpointing:
        recompute(model)
    model.train()
    ledger.leave_out([*model.parameters(), *model.buffers(), *inputs.values()])
    quick: Any = quickened(model, batch, fast) if fast else nullcontext([])
    pieces: Any = patch.dict(output_head.PIECE, cpu=piece)  # the device that is planned for may not be here
    away = saved_tensors_hooks(sent, brought) if checkpointing == "offload" else nullcontext()
    with quick as taken, ledger, pieces, away, patch.object(output_head, "tried", assumed):
        if accumulates:
            ledger.heading = "gradients"
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        ledger.heading = "activations"
        loss = task.sums(model, inputs)["loss"] + method.penalty(model)
        ledger.heading = "workspace"
        cast(Any, loss).backward()
        del loss
        model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return Step(ledger.moments, ledger.flops, ledger.moved, ledger.calls, ledger.made, batch.tokens, bool(taken))


def sent(tensor: Tensor) -> Any:
    """What is kept on a GPU of a tensor that is saved: nothing, where it is offloaded."""
    return (tensor.shape, tensor.dtype) if worth_it(tensor) else tensor


def brought(kept: Any) -> Tensor:
    """The tensor, back again."""
    return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])


def assumed(network: Any, *_: Any) -> output_head.OutputHead | None:
    """The output head, as `models.output_head.tried` finds it where nothing unusual happens behind it."""
    module = network.get_output_embeddings()
    return output_head.OutputHead.of(network, module) if type(module) is nn.Linear else None


def booked(parameter: Any, ledger: Ledger) -> Any:
    """A hook that books the gradient of `parameter` as one when it is made."""
    return parameter.register_post_accumulate_grad_hook(lambda one: ledger.move(one.grad, "gradients"))


def headings(model: nn.Module, ledger: Ledger) -> list[Any]:
    """Hooks that tell the ledger whether the body of the model computes, or its head."""
    network: Any = model

    def hook(heading: str) -> Any:
        def entered(*_: Any) -> None:
            ledger.heading = heading

        return entered

    body, head = network.base_model, network.get_output_embeddings()
    found = [body.register_forward_pre_hook(hook("activations"))] if body is not network else []
    return found + ([head.register_forward_pre_hook(hook("logits"))] if head is not None else [])
