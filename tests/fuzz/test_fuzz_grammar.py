"""Inputs that follow a grammar, made by Hypothesis: recipes as nested data, tables in the dialects of `csv`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fuzz.run import with_verdict
from fuzz.target import Target
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from peftctl.data.csv_rows import records
from peftctl.data.file import File, Row

QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SCALARS = some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text(max_size=8)
VALUES = some.recursive(
    SCALARS, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=6), inner, max_size=3)
)
KEYS = {
    "model": ("name_or_path", "dtype", "quantization", "device", "revision"),
    "method": ("type", "r", "alpha", "dropout", "target_modules", "rank_pattern", "modules_to_save"),
    "dataset": ("train", "eval", "format", "columns", "max_length", "train_on", "on_long"),
    "trainer": ("task", "steps", "epochs", "batch_size", "learning_rate", "schedule"),
    "eval": ("metrics", "gates", "labels", "max_rows"),
    "export": ("format",),
}
GOOD = {
    "model": {"name_or_path": "base"},
    "method": {"type": "lora"},
    "dataset": {"train": "rows.jsonl"},
    "output": "run",
}


@some.composite
def recipes(draw: Any) -> dict[str, Any]:
    """A good recipe in which some keys say anything."""
    made = json.loads(json.dumps(GOOD))
    for _ in range(draw(some.integers(1, 3))):
        block = draw(some.sampled_from(sorted(KEYS)))
        made.setdefault(block, {})[draw(some.sampled_from(KEYS[block]))] = draw(VALUES)
    return made


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return TARGETS["recipe"](tmp_path_factory.mktemp("recipe"))


@QUICK
@given(recipes())
def test_any_value_at_any_key(recipe: Target, made: dict[str, Any]):
    _, wrong, _ = with_verdict(recipe, {"recipe.yaml": json.dumps(made, ensure_ascii=False).encode()})
    assert wrong is None, wrong


CELLS = some.text(some.characters(codec="utf-8", exclude_characters="\0\r"), max_size=10)


@QUICK
@given(
    some.lists(some.tuples(CELLS, CELLS), min_size=1, max_size=5),
    some.sampled_from([",", "\t"]),
    some.sampled_from(["\n", "\r\n"]),
    some.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    some.booleans(),
)
def test_what_csv_writes_is_read_as_it_was(
    tmp_path: Path, cells: list[tuple[str, str]], delimiter: str, end: str, quoting: Any, mark: bool
):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([("a", "b"), *cells])
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.getvalue().encode())
    found = list(records(File(path, "rows.csv"), delimiter))
    assert all(isinstance(row, Row) for row in found)
    assert [(row.value["a"], row.value["b"]) for row in found] == cells
