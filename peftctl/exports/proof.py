"""The proof of a merge: the merged model gives the logits of the adapter on the base it was merged into."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.errors import ModelError
from peftctl.exports.dequantise import Quantised
from peftctl.exports.probes import Batch, batch_of
from peftctl.exports.running import running
from peftctl.exports.weights import Weights
from peftctl.methods import load
from peftctl.models import base as models
from peftctl.models.head import CAUSAL, PICTURES, Head

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
"""By the dtype that weights were rounded to. 32 bits: the largest difference of a logit, relative to the largest logit
(at least 1), which is what sums in another order differ by. 16 bits: the norm of all differences relative to that of
all logits (a root mean square of at least 1), 4 epsilons; rounding adds up over the layers of a deep model (0.013 to
0.019 of SmolLM2-135M, which has thirty), and single
logits stray by more."""


@dataclass(frozen=True)
class Distance:
    """How far the logits of one model are from those of another."""

    max_difference: float
    mean_difference: float
    scale: float
    """The largest logit of the other, its sign aside."""
    size: float
    """Root of the mean square of the other's logits."""
    relative_norm: float
    """Norm of all differences, relative to the norm of the other's logits."""
    kl: float
    """Mean Kullback-Leibler divergence of the next token, or of the class, in nats."""
    top1_agreement: float
    """Share of positions at which both find the same token, or class, the most probable."""

    @classmethod
    def of(cls, logits: Tensor, other: Tensor) -> Distance:
        """Both [rows, length, tokens], or [rows, classes] of whole texts, float32."""
        difference = (logits - other).abs()
        kl = 0.0
        for row, reference in zip(logits, other, strict=True):  # row by row: in float64 all of them are large
            p, q = reference.double().log_softmax(-1), row.double().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum(-1).mean()) / len(logits)
        return cls(
            max_difference=float(difference.max()),
            mean_difference=float(difference.mean()),
            scale=float(other.abs().max()),
            size=float(other.square().mean().sqrt()),
            relative_norm=float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(other)),
            kl=kl,
            top1_agreement=float((logits.argmax(-1) == other.argmax(-1)).float().mean()),
        )

    def judged(self, dtype: torch.dtype) -> float:
        """The figure that `TOLERANCES` limits for weights rounded to `dtype`."""
        if dtype.itemsize == 2:
            return self.relative_norm * min(1.0, self.size)
        return self.max_difference / max(1.0, self.scale)


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """float32 on the CPU, [rows, length, tokens] or [rows, classes]. Raises ModelError when one is not finite."""
    device = next(p.device for p in model.parameters() if not p.is_meta)
    given: dict[str, Any] = {key: value.to(device) for key, value in batch.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    found: Tensor = model(**given).logits.float().cpu()
    if not bool(torch.isfinite(found).all()):
        raise ModelError("the proof: a logit is not a finite number", "is the base, or the adapter, damaged?")
    return found


def asked(model: nn.Module, head: Head, ids: Tensor) -> tuple[Batch, Tensor]:
    """What the models are asked, and the logits of `model`; texts alone where it has its own way to take pictures."""
    if head == PICTURES:
        try:
            batch = batch_of(model, head, ids)
            return batch, logits(model, batch)
        except Exception:  # whatever a foreign model raises: some take pieces that only their processor cuts
            head = CAUSAL
    batch = batch_of(model, head, ids)
    return batch, logits(model, batch)


@dataclass(frozen=True)
class Proof:
    """What was found; `judge` says whether it is good enough."""

    merged: Distance
    """The merged model from the adapter on its base."""
    effect: Distance
    """The adapter on its base from the base alone: what there was to merge."""
    quantised: Distance | None
    """The merged model from the run as it was trained, quantised; only told."""
    dtype: torch.dtype
    """The coarsest that changed weights were rounded to."""
    positions: int
    """How many tokens, or classes, were predicted."""
    inputs: tuple[str, ...]
    """What the models were given, by its names in their forward."""

    @property
    def difference(self) -> float:
        """What is judged."""
        return self.merged.judged(self.dtype)

    def judge(self, place: str) -> None:
        """Raise ModelError when the merged model is another one than the adapter on its base."""
        if not self.difference <= TOLERANCES[self.dtype]:
            raise ModelError(
                f"{place}: the merged model is not the adapter on its base: its logits differ by "
                f"{self.difference:.2g} of their size, more than {TOLERANCES[self.dtype]:.2g}",
                "`export.dtype: float32` rounds least" if self.dtype.itemsize == 2 else None,
            )

    @property
    def drowned(self) -> bool:
        """Whether rounding moves the model by more than half of what the adapter does."""
        return self.merged.mean_difference > 0.5 * self.effect.mean_difference

    def record(self) -> dict[str, Any]:
        """For the report."""
        return {
            "difference": self.difference,
            "tolerance": TOLERANCES[self.dtype],
            "rounded_to": str(self.dtype).removeprefix("torch."),
            "positions": self.positions,
            "inputs": list(self.inputs),
            "merged_from_adapter": asdict(self.merged),
            "adapter_from_base": asdict(self.effect),
            "merged_from_quantised_run": asdict(self.quantised) if self.quantised else None,
        }


def prove(
    adapter: Path,
    base: tuple[Path, Weights],
    merged: tuple[Path, Weights],
    ids: Tensor,
    *,
    head: Head,
    dtypes: set[torch.dtype],
    quantised: Quantised | None = None,
    memory: int | None = None,
    poll: Callable[[], None],
) -> Proof:
    """Compare three models with `head` on the probes `ids`, one model in memory at a time.

    `base` and `merged` are folders with what to read of them; `dtypes` are those that changed weights were rounded
    to. Raises what loading a model raises.
    """
    model = running(*base, head, memory).eval()
    poll()
    batch, untouched = asked(model, head, ids)  # first: an adapter may be written into the base itself
    load(model, adapter)
    poll()
    reference = logits(model, batch)
    effect = Distance.of(reference, untouched)
    del model, untouched
    gc.collect()  # a model and its hooks are a cycle
    poll()
    model = running(*merged, head, memory)
    poll()
    found = logits(model, batch)
    del model
    gc.collect()
    poll()
    return Proof(
        merged=Distance.of(found, reference),
        effect=effect,
        quantised=None if quantised is None else distance_to_run(found, adapter, base[0], head, quantised, batch),
        dtype=max(dtypes, key=lambda dtype: TOLERANCES[dtype]),
        positions=found.shape[:-1].numel(),
        inputs=tuple(batch),
    )


def distance_to_run(
    merged: Tensor, adapter: Path, base: Path, head: Head, quantised: Quantised, batch: Batch
) -> Distance | None:
    """How far the merged model's logits are from those of the quantised base with its adapter, as it was trained.

    None where that cannot be run: bitsandbytes does not load, or the device does not quantise.
    """
    try:
        model = models.load(quantised.block(base), head).model
    except ModelError:
        return None
    return Distance.of(merged, logits(load(model, adapter).eval(), batch))
