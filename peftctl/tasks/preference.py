"""Learning from pairs of answers: what its tasks share.

A prepared row is the conversation with the better answer and, behind it, the same with the worse one, each up to the
last token that is trained; an empty span marks where the second begins.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from peftctl.data.batches import collate
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded, Encoder
from peftctl.data.formats import Example, Preference
from peftctl.data.preferred import chosen, preference, rejected
from peftctl.data.reading import Reading
from peftctl.engine.sample import IGNORED
from peftctl.errors import DataError
from peftctl.tasks.scores import keep_reference
from peftctl.tasks.sft import SFT
from peftctl.tasks.task import Batch, Task


@dataclass(frozen=True, kw_only=True)
class Preferring(Task):
    """A task whose rows are preferences; a batch [2 pairs, tokens] has all the better answers first."""

    learning_rate_scale: ClassVar[float] = 0.1
    metrics: ClassVar[tuple[str, ...]] = ("preference_accuracy", "preference_margin")

    @property
    def judged(self) -> Task:
        return SFT()

    @property
    def reading(self) -> Reading:
        return PAIRS  # the same for all of them: rows prepared for one serve the others

    def accept(self, example: Example) -> Example:
        return preference(example)

    def legible(self, row: Encoded) -> tuple[Encoded, str]:
        better, _ = parted(row)
        spans = tuple((start, end) for start, end in row.spans if start < end)
        shown = replace(row, spans=spans, pieces=1 + row.truncated)  # where an answer was cut, its turn does not end
        return shown, f"the better answer, from token {len(better) + 1} the worse one"

    def collate(self, rows: Sequence[Encoded], pad_id: int) -> Batch:
        both = [parted(row) for row in rows]
        batch = collate([one for one, _ in both] + [other for _, other in both], pad_id)
        return batch if rows else {name: tensor.expand(2, -1) for name, tensor in batch.items()}

    def weight(self, row: Encoded) -> int:
        """Every pair counts the same."""
        return 1

    def once(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        if self.needs_base:
            keep_reference(model, batches)

    def figures(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`loss` and what else there is to watch, of every pair [pairs]."""
        raise NotImplementedError

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        real = (batch["labels"] != IGNORED).any(dim=1).chunk(2)[0]  # a batch without rows has a pair of nothing
        return {name: (each * real).sum() for name, each in self.figures(model, batch).items()}


class PairEncoder:
    """Encodes preferences; what it is told about conversations and texts holds for both answers."""

    def __init__(self, one: Encoder) -> None:
        self.one = one
        self.tokenizer, self.max_length = one.tokenizer, one.max_length
        self.stop_ids = one.stop_ids
        self.spelled = 0

    @classmethod
    def of(cls, dataset: Dataset, tokenizer: Any, template: str | None) -> PairEncoder:
        """The encoder that a recipe's block asks for. Raises DataError for what pairs cannot be."""
        if dataset.on_long == "split":
            raise DataError("dataset.on_long: answers that are compared are not split", "use `truncate` or `drop`")
        if dataset.train_on not in ("assistant", "last"):
            raise DataError("dataset.train_on: only answers are compared", "use `assistant` or `last`")
        return cls(Encoder.of(dataset, tokenizer, template))

    @property
    def splits_special_tokens(self) -> bool:
        """Whether special tokens that a text spells are ordinary text."""
        return self.one.splits_special_tokens

    def encode(self, row: Preference) -> list[Encoded]:
        """A pair as one row; none where either answer is too long and dropped. Raises DataError."""
        before = self.one.spelled
        better, worse = self.one.encode(chosen(row)), self.one.encode(rejected(row))
        self.spelled += self.one.spelled > before
        return [joined(one, other) for one, other in zip(better, worse, strict=False)]

    def compared(self, row: Preference, whole: bool) -> Encoded:
        raise DataError(f"{row.place}: two answers are compared with each other, not with labels", "remove `labels`")

    def prompt(self, row: Preference) -> list[int]:
        return self.one.prompt(chosen(row))


PAIRS = Reading("pairs", preference, PairEncoder.of)


def joined(better: Encoded, worse: Encoded) -> Encoded:
    """Two sequences as one row."""
    first, second = better.ended(), worse.ended()
    start = len(first)
    spans = (*first.spans, (start, start), *((a + start, b + start) for a, b in second.spans))
    return Encoded(
        array("i", [*first.ids, *second.ids]), spans, better.truncated or worse.truncated, better.cut + worse.cut
    )


def parted(row: Encoded) -> tuple[Encoded, Encoded]:
    """The two sequences of a row."""
    middle = next(number for number, (a, b) in enumerate(row.spans) if a == b)
    start = row.spans[middle][0]
    second = tuple((a - start, b - start) for a, b in row.spans[middle + 1 :])
    return Encoded(row.ids[:start], row.spans[:middle]), Encoded(row.ids[start:], second)


def watched(rewards: Tensor) -> dict[str, Tensor]:
    """How the rewards of answers [2 pairs], the better ones first, lie to each other: to watch, per pair."""
    better, worse = rewards.detach().chunk(2)
    return {
        "reward_accuracy": (better > worse).float(),
        "reward_margin": better - worse,
        "chosen_reward": better,
        "rejected_reward": worse,
    }
