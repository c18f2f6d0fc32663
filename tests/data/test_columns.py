from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftctl.data.dataset import Dataset, Source
from peftctl.data.examples import examples, format_of
from peftctl.data.file import Row
from peftctl.data.formats import Chat, Pair, Text
from peftctl.data.formats.columns import at, mapped
from peftctl.data.mistakes import Mistakes
from peftctl.errors import DataError

Write = Callable[..., Path]
SQUAD = {"context": "c", "question": "who?", "answers": {"text": ["me", "you"], "answer_start": [3, 4]}}
MAPPED = {"prompt": "question", "completion": "answers.text.0"}


def read(root: Path, spec: str | Source = "rows.jsonl", **options: Any) -> tuple[list[Any], list[str]]:
    """The examples of one source, and what was said."""
    said: list[str] = []
    source = Source(path=spec) if isinstance(spec, str) else spec
    dataset, mistakes = Dataset(train=[source], **options), Mistakes()
    format = format_of(source, dataset, root, said.append, mistakes)
    if format is None:
        raise mistakes.error()
    return list(examples(source, format, dataset, root)), said


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ("question", "who?"),
        ("answers.text", ["me", "you"]),
        ("answers.text.1", "you"),
        ("answers.text.2", None),
        ("answers.texts", None),
        ("answers.text.-1", None),
        ("question.0", None),
        ("nothing", None),
    ],
)
def test_a_column_is_a_key_or_a_path(column: str, found: Any) -> None:
    assert at(SQUAD, column) == found


def test_a_key_with_a_dot_is_a_key() -> None:
    assert at({"a.b": 1, "a": {"b": 2}}, "a.b") == 1


@given(st.dictionaries(st.text(max_size=3), st.lists(st.integers(), max_size=2)), st.text(max_size=6))
def test_any_path_is_there_or_not(value: dict[str, Any], column: str) -> None:
    at(value, column)


def test_keys_can_change_places_and_one_without_its_column_is_missing() -> None:
    swapped = mapped(
        Row("a:1", {"prompt": 1, "completion": 2, "id": 3}), {"prompt": "completion", "completion": "prompt"}
    )
    assert swapped.value == {"prompt": 2, "completion": 1, "id": 3}
    assert mapped(Row("a:1", {"prompt": 1}), {"prompt": "question"}).value == {}


def test_rows_with_other_names_are_guessed_and_read(tmp_path: Path, write: Write) -> None:
    write(SQUAD, SQUAD)
    rows, said = read(tmp_path, columns=MAPPED)
    assert rows == [Pair(f"rows.jsonl:{line}", "who?", "me") for line in (1, 2)]
    assert said == ["rows.jsonl: rows are `prompt_completion`, guessed from their keys"]
    source = Source(path="rows.jsonl", columns={"text": "context"}, format="text")
    assert read(tmp_path, source, columns=MAPPED) == ([Text(f"rows.jsonl:{line}", "c") for line in (1, 2)], [])


@pytest.mark.parametrize("format", ["auto", "prompt_completion"])
def test_a_column_that_no_row_has(tmp_path: Path, write: Write, format: Any) -> None:
    write(SQUAD)
    with pytest.raises(DataError) as caught:
        read(tmp_path, columns={"prompt": "questions", "completion": "answer"}, format=format)
    assert [str(DataError.of([problem])) for problem in caught.value.problems] == [
        "rows.jsonl: no column `questions`, which `columns.prompt` names; the rows have `context`, `question`, "
        "`answers`; did you mean `question`?",
        "rows.jsonl: no column `answer`, which `columns.completion` names; the rows have `context`, `question`, "
        "`answers`; did you mean `answers`?",
    ]


def test_a_column_that_one_row_lacks_is_a_mistake_of_that_row(tmp_path: Path, write: Write) -> None:
    write(SQUAD, {"question": "who?"}, SQUAD)
    rows, _ = read(tmp_path, columns=MAPPED)
    assert [str(row) for row in rows if isinstance(row, DataError)] == ["rows.jsonl:2: `completion` is missing"]


def test_rows_of_csv_are_mapped_too(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("review,stars\ngood,1\nbad,0\n")
    rows, said = read(tmp_path, "rows.csv", columns={"text": "review", "label": "stars"})
    assert said == ["rows.csv: rows are `text_label`, guessed from their keys"]
    assert [row.messages[-1]["content"] for row in rows] == ["1", "0"]


def test_the_first_rows_decide_together_and_the_others_are_mistakes(tmp_path: Path, write: Write) -> None:
    write({"text": "a", "label": None}, *[{"text": "b", "label": "c"}] * 30, {"text": "d"})
    rows, said = read(tmp_path)
    assert said == ["rows.jsonl: rows are `text_label`, guessed from their keys"]
    assert [isinstance(row, Chat) for row in rows] == [False, *[True] * 30, False]
    assert [str(rows[0]), str(rows[-1])] == ["rows.jsonl:1: `label` is null", "rows.jsonl:32: `label` is missing"]


def test_a_row_is_found_behind_many_that_say_nothing(tmp_path: Path, write: Write) -> None:
    write(*[{"name": "x"}] * 25, {"text": "a"})
    rows, _ = read(tmp_path)
    assert rows[-1] == Text("rows.jsonl:26", "a")
    assert str(rows[0]) == "rows.jsonl:1: `text` is missing"


def test_a_form_that_is_not_trained_is_one_mistake_of_its_source(tmp_path: Path, write: Write) -> None:
    write(*[{"prompt": "a", "chosen": "b", "rejected": "c"}] * 5)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: supervised fine-tuning does not train preferences") as caught:
        read(tmp_path)
    assert len(caught.value.problems) == 1
    rows, _ = read(tmp_path, columns={"completion": "chosen"})
    assert rows[0] == Pair("rows.jsonl:1", "a", "b")
