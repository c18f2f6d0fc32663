"""Files of rows, GGUF files, chat templates."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import tiny_chat
from fuzz import corpora
from fuzz.mutations import Case, Mutator, splintered, with_number
from fuzz.target import Target, lay

from peftctl.data import template
from peftctl.data.dataset import Dataset, Source
from peftctl.data.examples import examples, format_of
from peftctl.data.file import Row
from peftctl.data.mistakes import Mistakes
from peftctl.data.sources import read
from peftctl.errors import DataError
from peftctl.models.gguf_header import read_header


def data(folder: Path) -> Target:
    """Files of rows in text, and what their rows are taken for."""
    return Target(Mutator(corpora.rows()), rows_check(folder))


def parquet(folder: Path) -> Target:
    """Parquet files."""
    return Target(Mutator(corpora.parquet(folder)), rows_check(folder))


def rows_check(folder: Path) -> Callable[[Case], None]:
    shown = folder / "data"
    shown.mkdir()

    def check(case: Case) -> None:
        lay(shown, case)
        (name,) = case
        source = Source(path=name)
        dataset = Dataset(train=name)
        wrong = None
        for item in read(source, shown):
            place = item.place if isinstance(item, Row) else item.text
            assert place.startswith(name), f"no place: {place!r}"
            if not isinstance(item, Row):
                wrong = DataError.of([item])
        form = format_of(source, dataset, shown, lambda line: None, Mistakes())
        for example in examples(source, form, dataset, shown) if form else ():
            wrong = example if isinstance(example, DataError) else wrong
        if wrong:
            raise wrong

    return check


def gguf(folder: Path) -> Target:
    """The header of a GGUF file."""
    made = [(bytes(file.data), file.spans) for file in corpora.GGUFS]
    path = folder / "model.gguf"

    def check(case: Case) -> None:
        path.write_bytes(case["model.gguf"])
        read_header(path)

    def numbers(random: Random, case: Case) -> None:
        content, spans = random.choice(made)
        case["model.gguf"] = with_number(random, content, spans)

    def header(random: Random, case: Case) -> None:
        content, spans = random.choice(made)
        end = spans[-1][0] + 8
        case["model.gguf"] = splintered(random, content[:end]) + content[end:]

    return Target(Mutator([{"model.gguf": content} for content, _ in made], [numbers, numbers, header]), check)


def chat(folder: Path) -> Target:
    """Chat templates and the conversations that they render. A rendering may take two seconds before it is stopped."""
    tokenizer = tiny_chat.tokenizer()
    texts = [template.find(name, tokenizer, folder, lambda line: None) for name in template.STOPS] + [
        tiny_chat.TEMPLATE
    ]
    corpus = [
        {"chat.jinja": text.encode(), "messages.json": json.dumps(row["messages"]).encode()}
        for text in texts
        for row in corpora.CHATS
    ]

    def check(case: Case) -> None:
        lay(folder, case)
        text = template.find("chat.jinja", tokenizer, folder, lambda line: None)
        messages = json.loads(json.dumps(corpora.CHATS[0]["messages"]))
        with contextlib.suppress(ValueError, RecursionError):
            messages = json.loads(case["messages.json"])
        template.render(spoken(messages), tokenizer, text, "rows.jsonl:1")

    return Target(Mutator(corpus), check, seconds=2.5)


def spoken(value: Any) -> list[dict[str, Any]]:
    """What the reader of rows lets through: mappings with a role, and texts without halves of characters."""
    kept = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    clean = json.loads(json.dumps(kept).replace("\\ud800", ""))
    return [{**item, "role": str(item.get("role"))} for item in clean]
