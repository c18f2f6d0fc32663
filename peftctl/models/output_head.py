"""The output head of a language model, run on no more than the positions that are wanted, in pieces.

Logits are wide: a row of 2048 tokens of a vocabulary of 128k takes a gigabyte in float32, and so does its gradient.
A model's own forward makes them whole. Here the head lets what reaches it through, for one forward (`let_through`), and
log-probabilities are computed afterwards, a few hundred positions at a time, from what came through.

What a model does to its logits it does here too: a factor commutes with the head, a cap (Gemma) is switched off and
applied here. Whether that is all that it does is tried out on the model itself, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftctl.engine.inputs import evaluating
from peftctl.models.soft import Soften, soften

PIECE = {"cpu": 16 << 20, "cuda": 32 << 20}
"""Elements of the logits that are held at once, by device."""

FEWEST = 64
"""Rows of a piece, where the vocabulary is so wide that even these hold more."""

LOOK = 8
"""Tokens of the row that a head is tried on."""

ROUNDING: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference between logits that is rounding, relative to the largest."""

Answers = Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
"""A task's `answers`: of a model and a batch, logits [n, vocabulary] and labels [n]."""


@dataclass(frozen=True)
class OutputHead:
    """A head that can be left out of the forward."""

    module: nn.Linear
    network: Any
    """The model that it is the head of."""
    cap: float | None
    """Logits are cap * tanh(logits / cap); None without one."""
    offset: Tensor | None
    """What is added to the logits [1, vocabulary]: BART and its kin keep a bias outside the head."""
    soften: Soften = soften
    """What makes probabilities of logits."""

    @classmethod
    def of(cls, network: Any, module: nn.Linear) -> OutputHead:
        """The head with what its model says that it does to logits."""
        cap = getattr(capped(network), "final_logit_softcapping", None)
        return cls(module, network, cap, vars(network)["_buffers"].get("final_logits_bias"))

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """The model's logits are what would have reached the head [..., width]."""
        own, network = vars(self.module).pop("forward", None), self.network
        vars(self.module)["forward"] = unchanged
        if self.cap is not None:
            capped(network).final_logit_softcapping = None
        if self.offset is not None:
            network.final_logits_bias = self.offset.new_zeros(1, 1)
        try:
            yield
        finally:
            del vars(self.module)["forward"]
            if own is not None:
                vars(self.module)["forward"] = own
            if self.cap is not None:
                capped(network).final_logit_softcapping = self.cap
            if self.offset is not None:
                network.final_logits_bias = self.offset

    def logits(self, x: Tensor) -> Tensor:
        """Logits [n, vocabulary], before the cap, of what reaches the head [n, width]."""
        logits: Tensor = self.module(x.to(self.module.weight.dtype))
        return logits if self.offset is None else logits + self.offset

    def logps(self, x: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities [n] in float32 of `labels` [n], of what reaches the head [n, width]."""
        rows = max(FEWEST, PIECE.get(x.device.type, PIECE["cpu"]) // self.module.out_features)
        if self.frozen:
            found: Tensor = Logps.apply(x.to(self.module.weight.dtype), labels, self, rows)  # type: ignore[no-untyped-call]
            return found
        pieces = zip(torch.split(x, rows), torch.split(labels, rows), strict=True)
        return torch.cat([checkpoint(self.whole, *piece, use_reentrant=False) for piece in pieces])

    def whole(self, x: Tensor, labels: Tensor) -> Tensor:
        """The same at once, by the module with whatever adapts it, for torch to differentiate."""
        return bent(self.logits(x).float(), self.cap).log_softmax(dim=-1).gather(1, labels[:, None]).flatten()

    @property
    def frozen(self) -> bool:
        """Whether nothing but its weight computes the logits, and that stays as it is."""
        return "adapters" not in self.module._modules and not any(p.requires_grad for p in self.module.parameters())


class Logps(torch.autograd.Function):
    """Log-probabilities of labels under a frozen head: d log p(y) / d x = W^T (onehot(y) - p), a row at a time.

    The gradient of each is found in the forward, where its logits are; what follows multiplies it by a number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, head: OutputHead, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        logps = torch.empty(len(x), dtype=torch.float32, device=x.device)
        gradient = torch.empty_like(x) if wanted else x.new_empty(0)
        for start in range(0, len(x), rows):
            at = slice(start, start + rows)
            logits = head.logits(x[at])
            logps[at] = head.soften(logits, labels[at], head.cap, wanted)
            if wanted:
                gradient[at] = logits @ head.module.weight
        ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None


def unchanged(x: Tensor) -> Tensor:
    """What stands for a head that lets everything through."""
    return x


def capped(network: Any) -> Any:
    """Where a model keeps the cap of its logits."""
    return network.config.get_text_config(decoder=True)


def output_head(model: nn.Module, answers: Answers, batch: Mapping[str, Tensor]) -> OutputHead | None:
    """The head of `model` if it can be left out of the forward by which `answers` reads a batch; else None.

    Tried out on the first tokens of `batch`, once for a model.
    """
    network = getattr(model, "module", model)
    if getattr(model, "_compiled_call_impl", None):
        return None
    if "output_head" not in vars(network):
        vars(network)["output_head"] = tried(network, answers, batch)
    head: OutputHead | None = vars(network)["output_head"]
    return head and replace(head, soften=vars(network).get("soften", soften))


@torch.no_grad()
def tried(network: Any, answers: Answers, batch: Mapping[str, Tensor]) -> OutputHead | None:
    """See `output_head`."""
    module = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    if type(module) is not nn.Linear or hasattr(module, "_hf_hook"):
        return None
    head = OutputHead.of(network, module)
    few = {name: one[:1, :LOOK] if one.ndim == 2 else one[:1] for name, one in batch.items()}
    few["labels"] = few["input_ids"].clone()
    try:
        with evaluating(network):
            logits, labels = answers(network, few)
            with head.let_through():
                x, _ = answers(network, few)
            found = bent(head.logits(x).float(), head.cap)
    except (RuntimeError, ValueError, TypeError):  # a foreign forward that does something else with its logits
        return None
    if found.shape != logits.shape or not len(labels):
        return None
    allowed = ROUNDING[module.weight.dtype] * float(logits.abs().max())
    return head if float((found - logits).abs().max()) <= allowed else None


def bent(logits: Tensor, cap: float | None) -> Tensor:
    """Logits under a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
