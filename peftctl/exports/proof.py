"""The proof of a merge: on probe prompts, the merged model says what the adapter on the same base says.

    error = ||merged - adapted|| / ||adapted||     over the logits of all probe positions, each centred

Both models compute in float32, so what is left is the rounding of the merged weights to their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.errors import NotMergeable
from peftctl.exports.tensors import Source
from peftctl.methods import load
from peftctl.models.base import Model
from peftctl.models.base import load as load_model

PROBES = (
    "The capital of France is Paris, and the river that runs through it is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Die Katze sitzt auf dem Dach und wartet auf den Regen.",
    "2 + 2 = 4, 3 * 7 = 21, and 10 - 6 =",
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error by dtype of the merged weights: a few times what rounding alone gives on real models."""


@dataclass(frozen=True)
class Proof:
    """How far two models are apart on the probes."""

    error: float
    """Relative distance of the logits, as above."""
    largest: float
    """Largest difference of a single logit."""
    kl: float
    """Mean Kullback-Leibler divergence [nats] of the next-token distributions."""
    top1: float
    """Share of positions with the same most probable token."""

    def record(self) -> dict[str, float]:
        return asdict(self)


def probe_ids(tokenizer: Any, texts: Sequence[str] = ()) -> list[list[int]]:
    """The probes, and the caller's own texts, as ids of at most 64 tokens."""
    return [tokenizer(text, verbose=False)["input_ids"][:64] for text in (*PROBES, *texts)]


@torch.no_grad()
def logits(model: nn.Module, probes: Sequence[Sequence[int]]) -> Tensor:
    """Float32 logits [positions, vocabulary] of every probe, one after the other, on the CPU."""
    device = next(model.parameters()).device
    rows = [model(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float().cpu() for ids in probes]
    return torch.cat(rows)


def compare(reference: Tensor, other: Tensor) -> Proof:
    """How far `other` is from `reference`, both logits [positions, vocabulary]."""
    width = min(reference.shape[1], other.shape[1])
    reference, other = reference[:, :width], other[:, :width]
    centred = reference - reference.mean(dim=1, keepdim=True)
    difference = other - reference
    moved = difference - difference.mean(dim=1, keepdim=True)
    p, q = reference.log_softmax(dim=1), other.log_softmax(dim=1)
    return Proof(
        error=float(moved.norm() / centred.norm()),
        largest=float(difference.abs().max()),
        kl=float((p.exp() * (p - q)).sum(dim=1).mean()),
        top1=float((reference.argmax(dim=1) == other.argmax(dim=1)).float().mean()),
    )


def adapted_logits(base: Path, adapter: Path, probes: Sequence[Sequence[int]], settings: Model) -> Tensor:
    """Logits of the adapter on the base in the folder `base`, loaded as `settings` says."""
    model = load_model(settings_for(settings, base)).model
    return logits(load(model, adapter), probes)


def plain_logits(folder: Path, probes: Sequence[Sequence[int]], settings: Model) -> Tensor:
    """Logits of the model in `folder`, loaded as `settings` says."""
    return logits(load_model(settings_for(settings, folder)).model, probes)


def stored_dtype(folder: Path) -> torch.dtype:
    """The least precise dtype of the weights in `folder`: what rounding in them is measured by."""
    source = Source(folder, str(folder))
    kinds = {source[name].dtype for name in source}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in kinds), torch.float32)


def settings_for(settings: Model, folder: Path) -> Model:
    """The same settings for another folder."""
    return replace(settings, name_or_path=str(folder), revision=None)


def judge(proof: Proof, dtype: torch.dtype) -> None:
    """Raise NotMergeable when a merge is further from its adapter than rounding explains."""
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if not proof.error <= tolerance:
        text = f"the merged model differs from the adapter by {proof.error:.2g} of its logits; {tolerance:g} is allowed"
        raise NotMergeable(text, "merge with `export.dtype: float32`; if it stays, this is a fault of peftctl")
