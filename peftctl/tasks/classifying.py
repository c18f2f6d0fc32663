"""What tasks share whose model ends in a head for a set of labels: where these come from, and that it is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.formats import Example
from peftctl.data.prepare import Prepared
from peftctl.engine.attach import takes
from peftctl.engine.inputs import evaluating
from peftctl.engine.method import Method
from peftctl.engine.sample import IGNORED
from peftctl.errors import DataError, ModelError, RecipeError, RunError
from peftctl.models.base import Base
from peftctl.models.head import SEQUENCES, Head
from peftctl.models.positions import room
from peftctl.models.quiet import Say, silent
from peftctl.tasks.task import Task

SHOWN = 20
"""Labels that are told by name."""


@dataclass(frozen=True, kw_only=True)
class Classifying(Task):
    """Texts, or their words, into classes."""

    talks: ClassVar[bool] = False
    measures: ClassVar[frozenset[str]] = frozenset({"truth", "labels"})

    labels: list[str] = field(default_factory=list)
    """The classes, in the order of the head's outputs; those of the training rows, sorted, when left out. A number in a
    row is the number of a class, from 0, where these are not numbers themselves."""

    kind: ClassVar[Head] = SEQUENCES

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label stands there twice")
        if len(self.labels) == 1:
            raise ValueError("one label leaves nothing to choose")

    @property
    def head(self) -> Head:
        return self.kind.with_labels(tuple(self.labels))

    def labels_of(self, example: Example) -> Iterable[str | int]:
        """The labels in an example."""
        raise NotImplementedError

    def named(self, label: str | int) -> str | int:
        """A label of a row by its name, where it is the number of one."""
        if isinstance(label, int) and str(label) not in self.labels and 0 <= label < len(self.labels):
            return self.labels[label]
        return label

    def worded(self, text: str, logits: Tensor) -> str:
        """What a model says of `text`, which a person asked; `logits` [n, labels] as `answers` has them."""
        raise NotImplementedError

    @torch.no_grad()
    def classified(self, text: str, base: Base) -> str:
        """By the names that the model has, where nothing else says them."""
        if not text.strip():
            raise RunError("the text is empty", 'give one: `peftctl generate RUN "a text"`')
        network = base.model
        task = self if self.labels else replace(self, labels=list(network.config.id2label.values()))
        encoder = task.encoder(Dataset(train="nothing", max_length=1 << 30), base.tokenizer, None)
        (row,) = encoder.encode(task.asked(text, chat=False))
        limit = room(network)
        if limit is not None and task.tokens(row) > limit:
            raise RunError(
                f"a text of {task.tokens(row):,} tokens, and {type(network).__name__} reads {limit:,}", "shorten it"
            )
        batch = task.collate([row], base.tokenizer.pad_token_id)
        with evaluating(network):
            logits, _ = task.answers(network, {name: tensor.to(base.device) for name, tensor in batch.items()})
        return task.worded(text, logits)

    def knowing(
        self, examples: Callable[[], Iterable[Example]], say: Say, classes: Callable[[], Sequence[str]] = tuple
    ) -> Task:
        if self.labels:
            return self
        met = {label for example in examples() for label in self.labels_of(example)}
        if not met:
            return self  # what is wrong with the rows is told where they are prepared
        if len(met) == 1:
            text = f"dataset.train: all rows have the label `{str(*met)[:60]}`, which leaves nothing to choose"
            raise DataError(text, "`peftctl data` shows the rows")
        numbers = all(isinstance(label, int) for label in met)
        labels = list(map(str, sorted(met) if numbers else sorted(map(str, met))))
        own = list(classes())
        same = sorted(own) == sorted(labels)  # its head may be trained already
        labels = own if same else labels
        shown = ", ".join(labels[:SHOWN]) + (f" and {len(labels) - SHOWN:,} more" if len(labels) > SHOWN else "")
        say(f"labels: {shown}; found in the rows{', in the order that the base has them in' if same else ''}")
        return replace(self, labels=labels)

    def of(self, head: Head) -> Task:
        return replace(self, labels=list(head.labels)) if head.labels else self

    def trains(self, method: Method, base: Base, say: Say = silent) -> Method:
        """The method with the head among the modules that it trains whole."""
        refuse_unsupported(base)
        if method.in_place:
            return method
        if "modules_to_save" not in [each.name for each in fields(method)]:
            text = "method.type: trains no head beside it, which this task needs"
            raise RecipeError(text, "choose one with `modules_to_save`, such as `lora`, or `full`")
        named: Any = method
        entries = dict.fromkeys([*named.modules_to_save, *modules_of_head(base)])
        return replace(named, modules_to_save=list(entries))  # type: ignore[no-any-return]

    def rows(self, prepared: Prepared, base: Base) -> Sequence[Encoded]:
        refuse_unsupported(base)
        return prepared.rows

    def answers(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        network: Any = getattr(model, "module", model)
        known = inspect.signature(network.forward).parameters
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if "token_type_ids" not in known or getattr(network.config, "type_vocab_size", 2) < 2:
            inputs.pop("token_type_ids", None)  # what a tokenizer tells apart, not every model does
        if takes(model, "prompt_mask"):
            inputs["prompt_mask"] = batch["attention_mask"].bool()
        if "use_cache" in known:
            inputs["use_cache"] = False
        logits = model(**inputs).logits
        wanted = batch["labels"] != IGNORED
        return logits[wanted].float(), batch["labels"][wanted]


def refuse_unsupported(base: Base) -> None:
    """Raise ModelError for a model with an encoder and a decoder, which reads a text twice, each in a way of its own,
    and for one that classifies by its last position (XLNet), which is padding beside a longer row.
    """
    hint = "choose an encoder, such as BERT, or a causal language model"
    if base.model.config.is_encoder_decoder:
        raise ModelError(f"{base.name}: classifies by a decoder beside its encoder, which is not supported", hint)
    if getattr(base.model.config, "summary_type", None) == "last":
        raise ModelError(f"{base.name}: classifies by its last position, padding or not", hint)


def modules_of_head(base: Base) -> list[str]:
    """What stands beside the model inside the model, and what of it is new, such as the pooler of BERT."""
    inside = base.model.base_model_prefix
    beside = [
        name for name, child in base.model.named_children() if name != inside and any(True for _ in child.parameters())
    ]
    return [*beside, *(name for name in base.new if name.partition(".")[0] not in beside)]


def number_of(label: str | int, labels: Sequence[str], place: str) -> int:
    """The number of a row's label. Raises DataError for one that is none of them."""
    if str(label) in labels:
        return labels.index(str(label))
    known = ", ".join(f"`{one}`" for one in labels[:SHOWN]) + (", ..." if len(labels) > SHOWN else "")
    hint = f"labels: {known}; the task's `labels` may name more than the training rows have"
    raise DataError(f"{place}: the label `{str(label)[:60]}` is none of the task's", hint)
