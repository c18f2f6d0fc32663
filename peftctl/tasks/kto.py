"""Kahneman-Tversky optimisation. Ethayarajh et al. 2024, arXiv:2402.01306.

    loss = w_d (1 - sigmoid(beta (r - z)))  of a good answer,  w_u (1 - sigmoid(beta (z - r)))  of a bad one  (eq. 7, 8)
    r = log p(answer) - log p_ref(answer),   z = max(0, mean of log p(y') - log p_ref(y'))

The mean is over the prompts of all rows of a step, whatever its micro-batches and processes, or of a whole evaluation
set; y' is an answer to another prompt, that of a row shortly before, always the same one. The reference is what
training started from, on the same weights.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import ClassVar, overload

import torch
from torch import Tensor, nn

from peftctl.config.block import Positive
from peftctl.data.batches import collate
from peftctl.data.encode import Encoded
from peftctl.data.formats import Example, Feedback, Preference
from peftctl.data.preferred import judged_answers
from peftctl.data.prepare import Prepared
from peftctl.data.reading import Reading
from peftctl.engine.sample import IGNORED
from peftctl.errors import DataError
from peftctl.models.base import Base
from peftctl.tasks.preference import PairEncoder
from peftctl.tasks.scores import keep_reference, reference_scores, scores
from peftctl.tasks.sft import SFT
from peftctl.tasks.task import Batch, Task, register

READ = ("input_ids", "attention_mask", "labels")
"""What a model reads of a batch, and what is trained of it."""

BAD = (0, 0)
"""The span that marks the row of a bad answer, before its others."""


@register
@dataclass(frozen=True, kw_only=True)
class KTO(Task):
    """Make good answers more probable and bad ones less; each answer for itself, no pairs are needed."""

    needs_base: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True
    learning_rate_scale: ClassVar[float] = 0.1
    metrics: ClassVar[tuple[str, ...]] = ("feedback_margin",)

    beta: Positive = 0.1
    """How close to stay to the reference: less lets the model go further."""
    desirable_weight: Positive = 1.0
    """What a good answer counts. Where there are few of them, raise it: the paper has this weight times their number
    between 1 and 4/3 of the same of bad ones."""
    undesirable_weight: Positive = 1.0
    """What a bad answer counts."""

    @property
    def judged(self) -> Task:
        return SFT()

    @property
    def reading(self) -> Reading:
        return ANSWERS

    def accept(self, example: Example) -> Example:
        judged_answers(example)
        return example

    def legible(self, row: Encoded) -> tuple[Encoded, str]:
        bad = row.spans[0] == BAD
        return replace(row, spans=row.spans[bad:]), "a bad answer" if bad else "a good answer"

    def rows(self, prepared: Prepared, base: Base) -> Sequence[Encoded]:
        """The rows, each with an answer to another prompt. Raises DataError where there is one prompt only."""
        return Mismatched(prepared.rows, max(prepared.lengths))

    def collate(self, rows: Sequence[Encoded], pad_id: int) -> Batch:
        """Answers and then, in the same order, answers to other prompts [2 rows, tokens]; `good` [rows]."""
        others = [row.other if isinstance(row, Answer) else row for row in rows]
        batch = collate([*rows, *others], pad_id)
        if not rows:
            batch = {name: tensor.expand(2, -1) for name, tensor in batch.items()}
        return {**batch, "good": torch.tensor([isinstance(row, Answer) and row.good for row in rows] or [False])}

    def once(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        keep_reference(model, ({name: batch[name] for name in READ} for batch in batches))

    def weight(self, row: Encoded) -> int:
        """Every answer counts the same."""
        return 1

    def ahead(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`divergence`: log p(y') - log p_ref(y'); `share_good`: how many answers are good; summed over the batch."""
        _, others = halves(batch)
        frozen = reference_scores(model, others)
        return {"divergence": (scores(model, others).logps - frozen.logps).sum(), "share_good": batch["good"].sum()}

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`chosen_reward` and `rejected_reward` add up to means over good and over bad answers, 0 without any."""
        own, _ = halves(batch)
        frozen = reference_scores(model, own)
        ratios = scores(model, own).logps - frozen.logps
        real = (own["labels"] != IGNORED).any(dim=1)
        good, bad = (real * one for one in (batch["good"], ~batch["good"]))
        z = batch.get("divergence", ratios.new_zeros(())).clamp(min=0)  # zero where training starts
        ahead = torch.where(batch["good"], ratios - z, z - ratios)
        weights = good * self.desirable_weight + bad * self.undesirable_weight
        rewards, share = self.beta * ratios.detach(), batch.get("share_good", torch.full_like(z, 0.5))
        chosen = (rewards * good).sum() / share.clamp(min=TINY)
        rejected = (rewards * bad).sum() / (1 - share).clamp(min=TINY)
        return {
            "loss": (weights * (1 - torch.sigmoid(self.beta * ahead))).sum(),
            "reward_accuracy": ((ahead.detach() > 0) * real).sum().float(),
            "reward_margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "kl": z * real.sum(),
        }


TINY = 1e-6
"""Less than any share of rows of a step that is not zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Encoded):
    """A prompt with its answer."""

    good: bool
    other: Encoded
    """The prompt with an answer to another one."""


class AnswerEncoder(PairEncoder):
    """Encodes answers that were judged, each as a row of its own."""

    def encode(self, row: Feedback | Preference) -> list[Encoded]:
        """The answers of a row, none where one of them is too long and dropped. Raises DataError."""
        before = self.one.spelled
        made = [(self.one.encode(answer), good) for answer, good in judged_answers(row)]
        self.spelled += self.one.spelled > before
        if not all(pieces for pieces, _ in made):
            return []
        first, *others = [marked(pieces[0].ended(), good) for pieces, good in made]
        lost = first.cut + sum(other.cut for other in others)  # told once, of a row that was read
        first = replace(first, truncated=lost > 0, cut=lost)
        return [first, *(replace(other, piece=n, cut=0) for n, other in enumerate(others, 1))]

    def compared(self, row: Feedback | Preference, whole: bool) -> Encoded:
        raise DataError(f"{row.place}: an answer that was judged is not compared with labels", "remove `labels`")

    def prompt(self, row: Feedback | Preference) -> list[int]:
        return self.one.prompt(judged_answers(row)[0][0])


def accepted(example: Example) -> Example:
    """The example, which has to say whether its answer is a good one."""
    judged_answers(example)
    return example


ANSWERS = Reading("answers", accepted, AnswerEncoder.of)


class Mismatched(Sequence[Encoded]):
    """Prepared rows, each with an answer to another prompt, cut so that no row is longer than before."""

    def __init__(self, rows: Sequence[Encoded], longest: int) -> None:
        self.rows, self.longest = rows, longest
        if all(asked(row) == asked(rows[0]) for row in rows):
            text = "dataset: all answers are to one prompt, and each is compared with one to another prompt"
            raise DataError(text, "`task: kto` needs several prompts, in each set of evaluation rows too")

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Answer: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Answer | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = self.rows[index]
        other = with_answer(asked(row), self.partner(index), self.longest)
        good = row.spans[0] != BAD
        return Answer(row.ids, row.spans if good else row.spans[1:], row.truncated, row.cut, good=good, other=other)

    def partner(self, index: int) -> Encoded:
        """A row before this one with another prompt: the nearest for the first row of a prompt, the next for the next.

        So the good and the bad answer of a pair do not both get the bad one of the pair before.
        """
        number, prompt = range(len(self))[index], asked(self.rows[index])
        first = next(back for back in count(1) if asked(self.rows[(number - back) % len(self)]) != prompt)
        others = (self.rows[(number - back) % len(self)] for back in count(2 * first - 1))
        return next(one for one in others if asked(one) != prompt)


def marked(row: Encoded, good: bool) -> Encoded:
    """The row as it is kept."""
    return row if good else replace(row, spans=(BAD, *row.spans))


def begin(row: Encoded) -> int:
    """Where the answer begins."""
    return next(start for start, end in row.spans if end > start)


def asked(row: Encoded) -> array[int]:
    """The ids before the answer."""
    return row.ids[: begin(row)]


def with_answer(prompt: array[int], other: Encoded, longest: int) -> Encoded:
    """The prompt with the answer of `other`, cut to `longest` tokens."""
    shift = len(prompt) - begin(other)
    spans = tuple((a + shift, min(b + shift, longest)) for a, b in other.spans if b > a and a + shift < longest)
    return Encoded((prompt + other.ids[begin(other) :])[:longest], spans)


def halves(batch: Mapping[str, Tensor]) -> tuple[Batch, Batch]:
    """The answers of a batch, and those to other prompts, as batches of sequences."""
    own, others = zip(*(batch[name].chunk(2) for name in READ), strict=True)
    return dict(zip(READ, own, strict=True)), dict(zip(READ, others, strict=True))
