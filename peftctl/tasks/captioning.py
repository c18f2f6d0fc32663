"""Captioning: a picture to the text that belongs to it. The part of the model that reads pictures stays as it is.

    loss = - sum over tokens t of the text, its end token included, of log p(token t | picture, tokens before t)

without the label smoothing that transformers' BLIP adds. A prepared row is the text's ids, after those of the prompt;
its picture is read when a batch needs it.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftctl.data.batches import collate
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.fitting import fit
from peftctl.data.formats import Captioned, Example
from peftctl.data.pictures import rgb
from peftctl.data.prepare import Prepared
from peftctl.data.reading import RowEncoder
from peftctl.data.spelling import Spelling
from peftctl.engine.method import Method
from peftctl.engine.sample import IGNORED
from peftctl.errors import DataError, RecipeError
from peftctl.models.base import Base
from peftctl.models.head import PICTURES, Head
from peftctl.models.quiet import Say, few, silent
from peftctl.models.seeing import drawn_from, eyes, logits_of
from peftctl.models.tokenizer import read_processor
from peftctl.tasks.task import Batch, Task, register

SHORTHANDS = ("all-linear", "attention", "mlp", "all", "auto", "sublayers")
"""Targets of the methods that name no module."""


@register
@dataclass(frozen=True, kw_only=True)
class Captioning(Task):
    """A picture to its text, by a model such as BLIP; what reads the pictures is trained only where targets name it."""

    talks: ClassVar[bool] = False
    needs_parsed: ClassVar[bool] = True
    measures: ClassVar[frozenset[str]] = frozenset({"truth", "text"})

    prompt: str = ""
    """What every text begins with, such as `a photo of`; it is not trained."""

    @property
    def head(self) -> Head:
        return PICTURES

    def refuses(self, method: Method) -> tuple[str, str] | None:
        if method.reads_tokens:
            return "trains a model that reads pictures beside tokens, which this method does not know", "use `lora`"
        return super().refuses(method)

    def trains(self, method: Method, base: Base, say: Say = silent) -> Method:
        """The method without targets in what reads pictures, where a shorthand such as `all-linear` would take them.

        Raises RecipeError for one that would take parts of it, named by nobody, and cannot be told to leave them out.
        """
        frozen = eyes(base.model)
        named: Any = method
        if method.in_place:
            say(f"method: trains what reads pictures too: {few(frozen)}")
            return method
        if "exclude_modules" not in [field.name for field in fields(method)]:
            taken = [site.name for site in method.sites(base.model) if under_one(site.name, frozen)]
            if taken and not getattr(method, "modules", None):
                text = f"method: would train what reads pictures, which nothing names: {few(taken)}"
                raise RecipeError(text, "name what it trains in `modules`, such as the last blocks of what writes")
            return method
        if named.target_modules not in SHORTHANDS or named.exclude_modules is not None:
            return method
        what = f"`{named.target_modules}` is taken of what writes; what reads pictures stays frozen: {few(frozen)}"
        say(f"method.target_modules: {what}")
        inside = "|".join(name.replace(".", r"\.") for name in frozen)
        return replace(named, exclude_modules=rf"(?:{inside})\..*")  # type: ignore[no-any-return]

    def accept(self, example: Example) -> Example:
        if not isinstance(example, Captioned):
            hint = "rows are `image` and `text`; a folder of pictures with `.txt` files of the same names will do"
            raise DataError(f"{example.place}: `captioning` trains pictures with their texts, which this is not", hint)
        return example

    def asked(self, text: str, chat: bool) -> Example:
        return Captioned("picture", text, "")

    def encoder(self, dataset: Dataset, tokenizer: Any, template: str | None) -> RowEncoder:
        return PictureEncoder(self.prompt, dataset, tokenizer)

    def ready(self, encoder: RowEncoder, base: Base) -> RowEncoder:
        assert isinstance(encoder, PictureEncoder)
        encoder.processor = read_processor(base.folder, base.name)
        return encoder

    def rows(self, prepared: Prepared, base: Base) -> Sequence[Encoded]:
        pairs = zip(prepared.rows, prepared.parsed, strict=True)
        processor = read_processor(base.folder, base.name)
        return [Seen.of(row, example, processor) for row, example in pairs]  # type: ignore[arg-type]

    def collate(self, rows: Sequence[Encoded], pad_id: int) -> Batch:
        """`pixel_values` [rows, channels, height, width] beside ids, mask and labels [rows, tokens]."""
        seen = [row for row in rows if isinstance(row, Seen)]
        pixels = {"pixel_values": torch.stack([row.pixels() for row in seen])} if seen else {}
        return {**collate(rows, pad_id), **pixels}

    def answers(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"][:, 1:]
        wanted = labels != IGNORED
        logits = logits_of(model, batch)[:, :-1]
        return logits[wanted].float(), labels[wanted]


@dataclass(frozen=True, slots=True)
class Seen(Encoded):
    """A row with its picture, which is read each time that it is needed."""

    example: Captioned | None = None
    processor: Any = None

    @classmethod
    def of(cls, row: Encoded, example: Captioned, processor: Any) -> Seen:
        """The row of `example`."""
        return cls(row.ids, row.spans, row.truncated, row.cut, row.piece, row.pieces, example, processor)

    @property
    def beside(self) -> str:
        return "" if self.example is None else self.example.place

    def pixels(self) -> Tensor:
        """What the model sees [channels, height, width]."""
        assert self.example is not None
        pixels: Tensor = self.processor(images=[rgb(self.example)], return_tensors="pt")["pixel_values"][0]
        return pixels


def under_one(name: str, outer: Sequence[str]) -> bool:
    """Whether the module `name` is one of `outer`, or lies inside one."""
    return any(f"{name}.".startswith(f"{each}.") for each in outer)


class PictureEncoder:
    """Encodes the texts of pictures; once it has a `processor`, with their pictures."""

    def __init__(self, prompt: str, dataset: Dataset, tokenizer: Any) -> None:
        if dataset.on_long == "split":
            raise DataError("dataset.on_long: the text of a picture is not split", "use `truncate` or `drop`")
        self.tokenizer, self.max_length, self.on_long = tokenizer, dataset.max_length, dataset.on_long
        self.before = prompt.rstrip() + " " if prompt.strip() else ""
        # BERT's kin, which many such models write with, end a text with their separator
        self.end: int = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        self.stop_ids: set[int] = {self.end}
        self.spelled = 0
        self.processor: Any = None
        self._spelling = Spelling(tokenizer, None, dataset.split_special_tokens)

    @property
    def splits_special_tokens(self) -> bool:
        """Whether special tokens that a text spells are ordinary text."""
        return self._spelling.split

    def encode(self, row: Captioned) -> list[Encoded]:
        """A row; none when its text is too long and dropped. Raises DataError for one too long, or without a text."""
        if not row.text.strip():
            raise DataError(f"{row.place}: the picture has no text", "give it one, or leave the picture out")
        rgb(row)  # a damaged one is told now, not when its turn comes in training
        self.spelled += self._spelling.in_text(row.text)
        tokens = self._spelling.plain(self.before + row.text.strip())
        ids, ends = (
            (tokens.ids, tokens.ends) if tokens.ids[-1:] == [self.end] else ([*tokens.ids, self.end], tokens.ends)
        )
        own = self._begin(ids)
        first = next(i for i, end in enumerate([*ends, len(self.before) + 1]) if end > len(self.before.rstrip()))
        shift = len(own) - len(ids)
        made = Encoded(array("i", own), ((max(first + shift, 1), len(own)),))
        pieces = fit(made, self.max_length, self.on_long, row.place)
        return [Seen.of(piece, row, self.processor) for piece in pieces] if self.processor else pieces

    def compared(self, row: Captioned, whole: bool) -> Encoded:
        raise DataError(f"{row.place}: texts of pictures are not compared with labels", "remove `labels`")

    def prompt(self, row: Captioned) -> list[int]:
        """The ids that a text goes on from: those of the prompt."""
        ids = self._begin(self._spelling.plain(self.before.strip()).ids)
        return ids[:-1] if ids[-1:] == [self.end] and len(ids) > 1 else ids

    def describe(self, model: nn.Module, rows: Sequence[Captioned], max_new_tokens: int, **how: Any) -> list[str]:
        """What `model` writes about the pictures of rows, behind the prompt; special tokens left out."""
        pixels = torch.stack([Seen.of(Encoded(array("i"), ()), row, self.processor).pixels() for row in rows])
        written = drawn_from(model, pixels, self.prompt(rows[0]), max_new_tokens, self.end, **how)
        return [str(text).strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _begin(self, ids: list[int]) -> list[int]:
        """The ids with a token before the first, which nothing predicts, where the tokenizer puts none there."""
        tokenizer = self.tokenizer
        starts = {tokenizer.cls_token_id, tokenizer.bos_token_id} - {None}
        if ids and ids[0] in starts:
            return ids
        start = next(id for id in (tokenizer.cls_token_id, tokenizer.bos_token_id, self.end) if id is not None)
        return [start, *ids]
