"""How probable a model finds answers, with one forward for answers that share what stands before them.

The labels of one row have the same prompt, and often differ in their last token only: then a single sequence gives the
probability of each.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from peftctl.data.encode import Encoded
from peftctl.engine.inputs import evaluating
from peftctl.tasks import Task

Tick = Callable[[int, int], None]
"""Hears how many sequences are done, of how many."""

Key = tuple[bytes, tuple[tuple[int, int], ...], str]
"""What makes two sequences the same to the model and to the loss."""


class Score(NamedTuple):
    """How a model does on the trained tokens of a sequence."""

    nats: float
    """Minus their log-probability."""
    first: array[int]
    """What it puts first in the place of each."""
    right: int
    """How many of them it puts first."""


def key(encoded: Encoded) -> Key:
    """Of one sequence."""
    return encoded.ids.tobytes(), encoded.spans, encoded.beside


def score(
    model: nn.Module, task: Task, sequences: Iterable[Encoded], batch_size: int, pad_id: int, tick: Tick
) -> dict[Key, Score]:
    """How `model` does on each different sequence, by `key`."""
    device = next(model.parameters()).device
    shared = sorted(gathered(sequences), key=lambda one: len(one.longest))  # equal lengths together: little is padded
    scores: dict[Key, Score] = {}
    with evaluating(model):
        for start in range(0, len(shared), batch_size):
            batch = shared[start : start + batch_size]
            inputs = {name: t.to(device) for name, t in task.collate([one.longest for one in batch], pad_id).items()}
            with torch.no_grad():
                logs = task.logits(model, inputs).log_softmax(dim=-1)
            parts = torch.split(logs, [one.longest.trained for one in batch])
            for one, part in zip(batch, parts, strict=True):
                scores |= one.read(part)
            tick(start + len(batch), len(shared))
    return scores


@dataclass(frozen=True)
class Shared:
    """A sequence, and others whose every trained token stands at a trained position of it, after the same tokens."""

    longest: Encoded
    members: list[Encoded] = field(default_factory=list)

    def holds(self, other: Encoded) -> bool:
        """Whether `other` can be a member. Both answers begin at one place: what is before may be read otherwise."""
        first, last = positions(other)[0], positions(other)[-1]
        mine = positions(self.longest)
        if self.longest.beside != other.beside:
            return False
        return mine[0] == first and self.longest.ids[:last] == other.ids[:last] and set(positions(other)) <= set(mine)

    def read(self, logs: torch.Tensor) -> dict[Key, Score]:
        """The scores of the members from the log-probabilities [trained, vocabulary] at the longest's positions."""
        place = {position: row for row, position in enumerate(positions(self.longest))}
        first = logs.argmax(dim=-1)
        found = {}
        for member in self.members:
            at = positions(member)
            rows = torch.tensor([place[p] for p in at], device=logs.device)
            tokens = torch.tensor([member.ids[p] for p in at], device=logs.device)
            nats = -float(logs[rows, tokens].double().sum())
            put = first[rows]
            found[key(member)] = Score(nats, array("i", put.tolist()), int((put == tokens).sum()))
        return found


def gathered(sequences: Iterable[Encoded]) -> list[Shared]:
    """Every different sequence as a member of some group, of as few groups as its neighbours in order allow."""
    unique = {key(e): e for e in sequences}.values()
    groups: list[Shared] = []
    # In reverse order a sequence comes right after those that begin with all that stands before its last token; bytes
    # have another order than numbers, but one that keeps those together that begin alike.
    for one in sorted(unique, key=lambda e: (e.beside, e.ids[: positions(e)[-1]].tobytes(), e.trained), reverse=True):
        if not groups or not groups[-1].holds(one):
            last = positions(one)[-1]
            groups.append(Shared(replace(one, ids=one.ids[: last + 1])))
        groups[-1].members.append(one)
    return groups


def positions(encoded: Encoded) -> Sequence[int]:
    """Where its trained tokens stand."""
    return [position for start, end in encoded.spans for position in range(start, end)]
