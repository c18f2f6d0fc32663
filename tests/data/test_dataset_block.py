from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from peftctl.config.fields import fields
from peftctl.data.dataset import Dataset, Source, Split

READ = TypeAdapter(Dataset)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("train", "a.jsonl", "a.jsonl"),
        ("train", {"path": "org/name", "split": "test"}, Source(path="org/name", split="test")),
        ("train", ["a", {"path": "b", "format": "text"}], ["a", Source(path="b", format="text")]),
        ("eval", "b.jsonl", "b.jsonl"),
        ("eval", {"split": 0.05}, Split(split=0.05)),
        ("eval", {"path": "b"}, Source(path="b")),
        ("eval", None, None),
    ],
)
def test_what_a_recipe_may_say(field: str, value: Any, expected: Any) -> None:
    assert getattr(READ.validate_python({"train": "x", field: value}), field) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"train": []},
        {"train": " "},
        {"train": ["a", ""]},
        {"train": {"path": ""}},
        {"train": {"path": "a", "weigt": 2}},
        {"train": {"path": "a", "streaming": True}},
        {"train": {"path": "a", "max_rows": 0}},
        {"train": {"path": "a", "sample_by": "word"}},
        {"eval": []},
        {"eval": {"split": 0}},
        {"eval": {"split": 1}},
        {"max_length": 0},
        {"max_skipped": 1.5},
        {"on_long": "splits"},
        {"on_bad_row": "warn"},
        {"format": "share_gpt"},
        {"columns": {"promt": "a"}},
        {"format": "text", "columns": {"prompt": "a"}},
        {"columns": {"instruction": "a", "source": "b"}},
        {"columns": {"prompt": " "}},
        {"train": {"path": "a", "format": "text"}, "columns": {"prompt": "a"}},
        {"train": {"path": "a", "columns": {"txet": "a"}}},
        {"trian": "a"},
    ],
)
def test_what_it_may_not(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        READ.validate_python({"train": "a", **wrong})


@pytest.mark.parametrize("block", [Dataset, Source, Split])
def test_every_field_is_documented(block: type) -> None:
    assert [field.name for field in fields(block) if not field.doc] == []
