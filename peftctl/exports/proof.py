"""The proof of a merge: the merged model gives the logits of the adapter on the base it was merged into."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.errors import ModelError
from peftctl.exports.dequantise import Quantised
from peftctl.exports.running import running
from peftctl.exports.weights import Weights
from peftctl.methods import load
from peftctl.models import base as models

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""By the dtype that weights were rounded to. 32 bits: the largest difference of a logit, relative to the largest logit
(at least 1), which is what sums in another order differ by. 16 bits: the norm of all differences relative to that of
all logits, 2 epsilons; rounding adds up over the layers of a deep model, and single logits stray by more."""

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody asks why.",
    "Übermorgen fährt Jürgen mit der U-Bahn nach Köln; das Öl ist teuer.",
    "La niña pidió café con leche; ¿cuánto cuesta? Son 12,50 €.",
    "Сегодня вечером мы пойдём в театр, если не будет дождя.",
    "人工智能正在改变世界。東京は今日も雨です。",
    "السلام عليكم، كيف حالك اليوم؟ नमस्ते दुनिया",
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # circle\n",
    '1, 1, 2, 3, 5, 8, 13, 21, 34: what comes next? {"answer": 55}',
)
"""What the models are asked, beside the caller's own texts."""

LENGTH = 16
"""Tokens in a row of probes."""

ROWS = 24
"""Most rows: the logits of one model for all of them are kept, 230 MB where there are 150,000 tokens."""


@dataclass(frozen=True)
class Distance:
    """How far the logits of one model are from those of another."""

    max_difference: float
    mean_difference: float
    scale: float
    """The largest logit of the other, its sign aside."""
    relative_norm: float
    """Norm of all differences, relative to the norm of the other's logits."""
    kl: float
    """Mean Kullback-Leibler divergence of the next token, in nats."""
    top1_agreement: float
    """Share of positions at which both find the same token the most probable."""

    @classmethod
    def of(cls, logits: Tensor, other: Tensor) -> Distance:
        """Both [rows, length, tokens], float32."""
        difference = (logits - other).abs()
        kl = 0.0
        for row, reference in zip(logits, other, strict=True):  # row by row: in float64 all of them are large
            p, q = reference.double().log_softmax(-1), row.double().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum(-1).mean()) / len(logits)
        return cls(
            max_difference=float(difference.max()),
            mean_difference=float(difference.mean()),
            scale=float(other.abs().max()),
            relative_norm=float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(other)),
            kl=kl,
            top1_agreement=float((logits.argmax(-1) == other.argmax(-1)).float().mean()),
        )

    def judged(self, dtype: torch.dtype) -> float:
        """The figure that `TOLERANCES` limits for weights rounded to `dtype`."""
        return self.relative_norm if dtype.itemsize == 2 else self.max_difference / max(1.0, self.scale)


def probes(tokenizer: Any, vocabulary: int, texts: Sequence[str] = ()) -> Tensor:
    """Token ids [rows, LENGTH] of the caller's `texts` and of ours, and a row from all over the vocabulary.

    Rows are cut from the texts in a row, without padding. The caller's come first, and take two thirds at most.
    """
    spread = [(number * vocabulary // LENGTH + number) % vocabulary for number in range(LENGTH)]
    own = rows(tokenizer, TEXTS)
    asked = rows(tokenizer, texts)[: ROWS * 2 // 3]
    return torch.tensor([*asked, *own[: ROWS - 1 - len(asked)], spread])


def rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of `texts`, one after the other, cut into rows; the last one begins again with the first tokens."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids += ids[: -len(ids) % LENGTH] if len(ids) >= LENGTH else ids * LENGTH
    return [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """float32 on the CPU, [rows, length, tokens]. Raises ModelError when one is not finite."""
    device = next(p.device for p in model.parameters() if not p.is_meta)
    ids = ids.to(device)
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float().cpu()
    if not bool(torch.isfinite(found).all()):
        raise ModelError("the proof: a logit is not a finite number", "is the base, or the adapter, damaged?")
    return found


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
    rows: int

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
            "positions": self.rows * LENGTH,
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
    dtypes: set[torch.dtype],
    quantised: Quantised | None = None,
    memory: int | None = None,
    poll: Callable[[], None],
) -> Proof:
    """Compare three models on the probes `ids`, one model in memory at a time.

    `base` and `merged` are folders with what to read of them; `dtypes` are those that changed weights were rounded
    to. Raises what loading a model raises.
    """
    model = running(*base, memory).eval()
    poll()
    untouched = logits(model, ids)  # first: an adapter may be written into the base itself
    load(model, adapter)
    poll()
    reference = logits(model, ids)
    effect = Distance.of(reference, untouched)
    del model, untouched
    gc.collect()  # a model and its hooks are a cycle
    poll()
    model = running(*merged, memory)
    poll()
    found = logits(model, ids)
    del model
    gc.collect()
    poll()
    return Proof(
        merged=Distance.of(found, reference),
        effect=effect,
        quantised=None if quantised is None else distance_to_run(found, adapter, base[0], quantised, ids),
        dtype=max(dtypes, key=lambda dtype: TOLERANCES[dtype]),
        rows=len(ids),
    )


def distance_to_run(merged: Tensor, adapter: Path, base: Path, quantised: Quantised, ids: Tensor) -> Distance | None:
    """How far the merged model's logits are from those of the quantised base with its adapter, as it was trained.

    None where that cannot be run: bitsandbytes does not load, or the device does not quantise.
    """
    try:
        model = models.load(quantised.block(base)).model
    except ModelError:
        return None
    return Distance.of(merged, logits(load(model, adapter).eval(), ids))
