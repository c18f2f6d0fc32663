"""The recipe block `dataset`: which rows, what they are, how long they may be."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from peftctl.config.block import Block, Count, Fraction, Positive
from peftctl.config.quote import quoted
from peftctl.data.formats import Format
from peftctl.data.formats.columns import refuse_unknown

SampleBy = Literal["document", "paragraph", "line"]
"""What one row of a text file is."""

Role = Literal["system", "user", "assistant", "tool"]
"""Who a message of a conversation is from."""

TrainOn = Literal["assistant", "last", "all"] | list[Role]
"""What is trained of a conversation."""


@dataclass(frozen=True, kw_only=True)
class Source(Block):
    """One place that rows come from, where a bare path does not say enough."""

    path: str
    """A file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.txt`, `.md`; all but Parquet also as `.gz`), a folder or
    a glob of one kind of them, or a hub id; an existing path beats a hub id. In a folder, README, LICENSE and
    hidden files are no rows. Of a folder of pictures each is a row, its text in a `.txt` file of the same name."""

    weight: Positive = 1.0
    """How often its rows are seen in an epoch: 2 is each twice, 0.5 one half of them and then the other."""

    split: str = "train"
    """Split of a hub data set; files have none."""

    subset: str | None = None
    """Subset (configuration) of a hub data set."""

    streaming: bool = False
    """Whether rows of a hub data set are fetched one after another instead of downloading all of it; the first
    `max_rows` are fetched once and held in memory."""

    max_rows: Count | None = None
    """How many rows are read, from the first on, those included that cannot be used; left out, all of them."""

    sample_by: SampleBy = "document"
    """What one row of a text file is: all of it, a paragraph (ends at a blank line), or a line."""

    format: Format | None = None
    """What the rows of this source are; left out, `dataset.format` holds."""

    columns: dict[str, str] | None = None
    """Keys that are called otherwise in this source; left out, `dataset.columns` holds."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError("`path` is empty")
        refuse_unknown(self.columns or {}, self.format)
        if self.streaming and self.max_rows is None:
            raise ValueError("`streaming` needs `max_rows`; hint: the rows are held in memory, so say how many")


@dataclass(frozen=True, kw_only=True)
class Split(Block):
    """Evaluation rows held out of the training rows, chosen by the recipe's seed."""

    split: Fraction
    """Share of the training rows, above 0 and below 1."""

    def __post_init__(self) -> None:
        if not 0 < self.split < 1:
            raise ValueError("`split` must lie between 0 and 1, both excluded")


Sources = str | Source | list[str | Source]
"""One source or several; a bare text is a path or a hub id."""


def what_eval_is(value: Any) -> Literal["source", "Split", "named"]:
    """Which form of `eval` is meant. A key that is nearly one of a source's is mistyped, no name of a set."""
    if not isinstance(value, dict):
        return "source"
    known = [field.name for block in (Source, Split) for field in fields(block)]
    near = [get_close_matches(str(key).casefold(), known, n=1, cutoff=0.8) for key in value]  # 0.8: `math` is no `path`
    if near == [["split"]]:
        return "Split"
    return "source" if any(near) else "named"


EvalSets = Annotated[
    Annotated[Sources, Tag("source")] | Annotated[Split, Tag("Split")] | Annotated[dict[str, Sources], Tag("named")],
    Discriminator(what_eval_is),
]
"""Evaluation rows, or several sets of them by name."""

SET_NAME = re.compile(r"\w[\w.-]*")

ONLY = ""
"""The name of evaluation rows where a recipe has one set of them and no name for it."""


@dataclass(frozen=True, kw_only=True)
class Dataset(Block):
    """What is trained and evaluated on. Relative paths start at the recipe's folder."""

    train: Sources
    """Training rows: a file, folder, glob or hub id, `{path, format, ...}`, or a list of these."""

    eval: EvalSets | None = None
    """Evaluation rows: the same, or `{split: 0.05}` to hold that share of the training rows out, or several sets of
    rows by name, `{held_out: a.jsonl, hard: b.jsonl}`; the loss of the first says which step is best."""

    format: Literal["auto"] | Format = "auto"
    """What a row is; `auto` guesses from the first 20 rows of each source and says so."""

    columns: dict[str, str] = field(default_factory=dict)
    """Keys that are called otherwise in the files, `{prompt: question, completion: answer.text}`: key of the format,
    then the column, or a dotted path to what stands in it."""

    chat_template: str = "tokenizer"
    """`tokenizer` for the tokenizer's own, the name of one of peftctl's, or a Jinja file."""

    train_on: TrainOn = "assistant"
    """What is trained of a conversation: every turn of the assistant with its stop token, the `last` of them, `all`
    tokens, or the turns of a list of roles, as in `[user, assistant]`. `all` trains prompts too, beside completions."""

    system: str | None = None
    """System message of conversations that have none."""

    split_special_tokens: bool = True
    """Special tokens that a row's own text spells are ordinary text; `false` takes them as what they spell, for rows
    that were rendered with a template before."""

    max_length: Count = 2048
    """Longest row, in tokens."""

    on_long: Literal["truncate", "split", "drop", "error"] = "truncate"
    """A longer row is cut to its first `max_length` tokens, makes several rows, is left out, or is a bad row."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be used: the run stops, or the row is left out and counted."""

    max_skipped: Fraction = 0.01
    """Largest share of rows that may be skipped or dropped before the run stops."""

    def __post_init__(self) -> None:
        refuse_unknown(self.columns, None if self.format == "auto" else self.format)
        if self.train_on == []:
            raise ValueError("`train_on` names no role; hint: `[assistant]` is the same as `assistant`")
        if self.eval == {}:
            raise ValueError("`eval` names no source")
        named = self.eval.items() if isinstance(self.eval, dict) else [("", self.eval)]
        for key in self.eval if isinstance(self.eval, dict) else ():
            if not SET_NAME.fullmatch(key):
                raise ValueError(f"`eval`: the name {quoted(key)} has more than letters, digits, `_`, `-` and `.`")
        for name, value in (("train", self.train), *((f"eval.{key}".rstrip("."), value) for key, value in named)):
            if value == [] or (isinstance(value, str) and not value.strip()):
                raise ValueError(f"`{name}` names no source")
            if isinstance(value, list) and any(isinstance(path, str) and not path.strip() for path in value):
                raise ValueError(f"`{name}` has an empty path")
            for source in value if isinstance(value, list) else [value]:
                if isinstance(source, Source) and source.columns is None and source.format is not None:
                    refuse_unknown(self.columns, source.format)

    @property
    def eval_sets(self) -> dict[str, Sources]:
        """Sources of evaluation rows by the name of their set; none where they are held out of the training rows."""
        if self.eval is None or isinstance(self.eval, Split):
            return {}
        return dict(self.eval) if isinstance(self.eval, dict) else {ONLY: self.eval}
