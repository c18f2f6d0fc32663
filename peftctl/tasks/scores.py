"""How probable a model finds answers, now and where training started."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftctl.engine.attach import acting, methods
from peftctl.engine.inputs import evaluating
from peftctl.engine.sample import IGNORED
from peftctl.tasks.sft import SFT
from peftctl.tasks.task import REFERENCE


class Scores(NamedTuple):
    """How probable a model finds answers."""

    logps: Tensor
    """Log-probability [answers] of the trained tokens together, in nats."""
    tokens: Tensor
    """How many they are [answers]."""

    @property
    def mean(self) -> Tensor:
        """Log-probability per token [answers]."""
        return self.logps / self.tokens.clamp(min=1)


def scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
    """How probable `model` finds the trained tokens of each sequence of a batch."""
    each, tokens = SFT().logps(model, batch), counted(batch)
    row = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens)
    return Scores(each.new_zeros(len(tokens)).index_add(0, row, each), tokens)


def counted(batch: Mapping[str, Tensor]) -> Tensor:
    """Trained tokens of each sequence."""
    return (batch["labels"][:, 1:] != IGNORED).sum(dim=1)


@contextmanager
def reference(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was when training started: the base, with the adapter that the run started from, no dropout.

    Yields it without what wraps it for several processes, which have nothing to tell each other here.
    """
    network = getattr(model, "module", model)
    with acting(network, [REFERENCE] if REFERENCE in methods(network) else []), evaluating(network), torch.no_grad():
        yield network


def reference_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
    """How probable the reference finds them: as `keep_reference` wrote down, or computed."""
    kept = vars(getattr(model, "module", model)).get("reference_logps", {})
    found = [kept.get(key) for key in keys(batch)] if kept else [None]
    if all(one is not None for one in found):
        return Scores(torch.tensor(found, device=batch["labels"].device), counted(batch))
    with reference(model) as start:
        return scores(start, batch)


def keep_reference(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Write down how probable the reference finds every sequence of `batches`."""
    kept: dict[bytes, float] = {}
    with reference(model) as start:
        for batch in batches:
            kept |= zip(keys(batch), scores(start, batch).logps.tolist(), strict=True)
    vars(model)["reference_logps"] = kept


def keys(batch: Mapping[str, Tensor]) -> list[bytes]:
    """What stands for each sequence: its ids, and which of them are trained."""
    trained = torch.stack([batch["input_ids"], batch["labels"]], dim=-1).cpu()
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [row[:length].numpy().tobytes() for row, length in zip(trained, lengths, strict=True)]
