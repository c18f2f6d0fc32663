"""The rows of a recipe, prepared for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftctl.data.dataset import Split
from peftctl.data.encode import Encoder
from peftctl.data.prepare import Prepared, hold_out, prepare
from peftctl.errors import DataError
from peftctl.models.base import load_tokenizer
from peftctl.recipe import Recipe

HERE = Path(".")
"""Where relative paths start: reading a recipe has made its paths relative to the working directory."""


@dataclass(frozen=True)
class Rows:
    """Training rows, and evaluation rows when the recipe has some."""

    train: Prepared
    eval: Prepared | None

    @classmethod
    def read(cls, recipe: Recipe, say: Callable[[str], None]) -> Rows:
        """Read, check and encode everything. Raises DataError with all that is wrong."""
        dataset = recipe.dataset
        tokenizer = load_tokenizer(recipe.model, say=say)
        train = prepare(dataset.train, dataset, tokenizer, HERE, say)
        if isinstance(dataset.eval, Split):
            return cls(*hold_out(train, dataset.eval.split, recipe.seed))
        return cls(train, prepare(dataset.eval, dataset, tokenizer, HERE, say) if dataset.eval is not None else None)

    def digests(self) -> dict[str, str | None]:
        """Hashes that differ when the data does."""
        return {"train": self.train.digest, "eval": self.eval.digest if self.eval else None}

    def counts(self) -> dict[str, Any]:
        """Where the rows went, for training and evaluation."""
        return {name: asdict(part.counts) for name, part in (("train", self.train), ("eval", self.eval)) if part}


def evaluation_rows(recipe: Recipe, tokenizer: Any, say: Callable[[str], None]) -> tuple[Prepared, Encoder]:
    """The rows to measure on, as they were read and as they are encoded. Raises DataError when there are none."""
    dataset = recipe.dataset
    if dataset.eval is None:
        raise DataError("dataset.eval: nothing to evaluate on", "name a file, or `eval: {split: 0.05}`")
    if isinstance(dataset.eval, Split):
        train = prepare(dataset.train, dataset, tokenizer, HERE, say, keep_parsed=True)
        _, rows = hold_out(train, dataset.eval.split, recipe.seed)
    else:
        rows = prepare(dataset.eval, dataset, tokenizer, HERE, say, keep_parsed=True)
    return rows, Encoder.of(dataset, tokenizer, rows.chat_template)
