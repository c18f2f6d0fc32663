"""A task: which rows it takes, how they become batches, what the loss is and what is measured.

Whatever the task, a prepared row is token ids with spans of them that are trained (`data/fitting.py`); what a task puts
there beside texts, such as the number of a label, only its own `encoder` and `collate` know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from peftctl.config import variant
from peftctl.config.block import Block
from peftctl.data.batches import collate
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded, Encoder
from peftctl.data.formats import Chat, Example, Text
from peftctl.data.prepare import Prepared
from peftctl.data.reading import Reading, RowEncoder
from peftctl.data.supervised import supervised
from peftctl.engine.method import Method
from peftctl.models.base import Base
from peftctl.models.head import CAUSAL, Head
from peftctl.models.output_head import bent, output_head
from peftctl.models.quiet import Say, silent

Batch = dict[str, Tensor]

REFERENCE = "reference"
"""Name of the adapter that a run started from, where it stays attached, frozen, to compare with."""


@dataclass(frozen=True, kw_only=True)
class Task(Block):
    """What a recipe's `trainer.task` becomes. A task overrides what differs from supervised fine-tuning."""

    talks: ClassVar[bool] = True
    """Whether its rows may be conversations, so that templates, system messages and `train_on` mean something."""

    packable: ClassVar[bool] = False
    """Whether rows may lie end to end in a line."""

    needs_parsed: ClassVar[bool] = False
    """Whether training needs rows as they were read, beside their ids."""

    needs_base: ClassVar[bool] = False
    """Whether training compares with where it started, so that nothing may train the base in place."""

    looks_ahead: ClassVar[bool] = False
    """Whether the loss of a row depends on all rows of its step, see `ahead`."""

    form: ClassVar[str] = "auto"
    """What rows are made up as for it, where nobody says (`data/formats`)."""

    steady: ClassVar[bool] = True
    """Whether the loss of a step tells how training goes; where chance decides it, evaluation alone does."""

    learning_rate_scale: ClassVar[float] = 1.0
    """What a method's own learning rate is multiplied by, where a recipe names none."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    """What is measured where a recipe names nothing."""

    measures: ClassVar[frozenset[str]] = frozenset({"truth", "labels", "text", "pairs", "feedback"})
    """What metrics may read of a model that was trained so, see `evaluation/metric.py`."""

    @property
    def head(self) -> Head:
        """The kind of model that it trains."""
        return CAUSAL

    @property
    def judged(self) -> Task:
        """The task by which the model that comes of it is measured."""
        return self

    def knowing(
        self, examples: Callable[[], Iterable[Example]], say: Say, classes: Callable[[], Sequence[str]] = tuple
    ) -> Task:
        """The task with what it takes from the training rows, which `examples` reads and `say` tells; most need not.

        `classes` are what the base calls its own, in their order.
        """
        return self

    def of(self, head: Head) -> Task:
        """The task with what an adapter's folder says of the model that it was trained for."""
        return self

    def imitated(self) -> Task:
        """The task for a stand-in of the model, whose tokenizer is one of bytes; most stay as they are."""
        return self

    def refuses(self, method: Method) -> tuple[str, str] | None:
        """Why it cannot train with `method`, and the way out; None where it can."""
        if self.needs_base and method.in_place:
            what = "is compared with the base while it trains, which this method changes"
            return what, "`type: layers` and adapters leave the base as it is"
        return None

    def trains(self, method: Method, base: Base, say: Say = silent) -> Method:
        """The method as the task trains by it: with what has to be trained beside it, say; most change nothing.

        Raises RecipeError.
        """
        return method

    @property
    def reading(self) -> Reading:
        """How rows are read for it."""
        return Reading(repr(self), self.accept, self.encoder)

    def accept(self, example: Example) -> Example:
        """What an example becomes. Raises DataError for a kind that it makes nothing of."""
        return supervised(example)

    def asked(self, text: str, chat: bool) -> Example:
        """What a person asks as a row without its answer: as a message where the model was taught a `chat`."""
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
        return Chat("text", said) if chat else Text("text", text)

    def classified(self, text: str, base: Base) -> str | None:
        """The class of `text` for a person to read; None where the model writes, not chooses. Raises RunError."""
        return None

    def encoder(self, dataset: Dataset, tokenizer: Any, template: str | None) -> RowEncoder:
        """Encodes what was accepted."""
        return Encoder.of(dataset, tokenizer, template)

    def ready(self, encoder: RowEncoder, base: Base) -> RowEncoder:
        """The encoder with what it needs of the base beside its tokenizer; most need nothing."""
        return encoder

    def legible(self, row: Encoded) -> tuple[Encoded, str]:
        """A prepared row as tokens alone, for a person to read, and in words what else it holds; most hold no more."""
        return row, ""

    def tokens(self, row: Encoded) -> int:
        """How many of a prepared row's ids a model reads; most hold no others."""
        return len(row)

    def rows(self, prepared: Prepared, base: Base) -> Sequence[Encoded]:
        """Prepared rows as `collate` takes them: with what is not kept as ids, such as pictures."""
        return prepared.rows

    def once(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Compute what training needs of every row again and again, where that stays as it is; most have nothing."""

    def seen(self, rows: Sequence[Encoded], seed: int, step: int) -> Sequence[Encoded]:
        """The rows as one step of training sees them, where chance plays a part: a function of its arguments alone."""
        return rows

    def collate(self, rows: Sequence[Encoded], pad_id: int) -> Batch:
        """Rows as tensors; no rows make a batch without anything to train, of the same keys."""
        return collate(rows, pad_id)

    def answers(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] in float32 and labels [n] of all that a batch has to get right, row after row."""
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits of `answers`, with the output head run on no other positions."""
        head = output_head(model, self.answers, batch)
        if head is None:
            return self.answers(model, batch)[0]
        with head.let_through():
            x, _ = self.answers(model, batch)
        return bent(head.logits(x).float(), head.cap)

    def logps(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities [n] in float32 of all that a batch has to get right, row after row."""
        head = output_head(model, self.answers, batch)
        if head is None:
            logits, labels = self.answers(model, batch)
            return logits.log_softmax(dim=-1).gather(1, labels[:, None]).flatten()
        with head.let_through():
            x, labels = self.answers(model, batch)
        return head.logps(x, labels)

    def ahead(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the loss of each row takes from all rows of a step: scalars, summed over the batch.

        They are computed before any loss, without gradients and dropout; `sums` finds their means over the step, as
        rows weigh, in its batch under the same names.
        """
        return {}

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is minimised, `loss`, and other figures to watch: scalars in float32, summed over the batch.

        The loop divides them by the weights of all rows of a step, so neither micro-batches nor processes change them.
        """
        return {"loss": -self.logps(model, batch).sum()}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What is minimised, summed over the batch."""
        return self.sums(model, batch)["loss"]

    def weight(self, row: Encoded) -> int:
        """What a row counts in the mean over a step."""
        return row.trained


TASKS: dict[str, type[Task]] = {}
"""Every task by the name of its file."""

T = TypeVar("T", bound=type[Task])


def register(cls: T) -> T:
    """Make `cls` available to recipes under the name of its file."""
    TASKS[cls.__module__.rpartition(".")[2]] = cls
    return cls


def name_of(task: Task) -> str:
    """The key of a task in recipes."""
    return next(name for name, cls in TASKS.items() if cls is type(task))


def read(value: Any) -> Task:
    """A recipe's `trainer.task`: a name, or a mapping with `type` and the fields of that task."""
    return variant.read(value if isinstance(value, Mapping | Task) else {"type": value}, Task, TASKS, "task")


def plain(task: Task) -> Any:
    """The task as `read` reads it back: its name alone where it has no fields."""
    fields = variant.plain(task, name_of(task))
    return fields if len(fields) > 1 else fields["type"]
