"""What fuzzing found, each as the smallest case that shows it: all are refused, in texts that can be shown, at once."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from fuzz import corpora
from fuzz.mutations import Case
from fuzz.run import with_verdict
from fuzz.target import Target
from fuzz.targets import TARGETS

from peftctl import recipe as recipes
from peftctl.data.parquet_rows import _first_line

RECIPE = "model: {name_or_path: base}\nmethod: {type: lora}\ndataset: {train: rows.jsonl}\noutput: run\n"
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["model.layers.0.self_attn.q_proj"]}
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def header(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def adapter(config: object, weights: bytes) -> Case:
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}


def rows(text: str, name: str = "rows.jsonl") -> Case:
    return {name: text.encode()}


LONG = "x" * 70_000
SAVED = header(
    {NAME: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}}
    | {NAME.replace("_A", "_B"): {"dtype": "F32", "shape": [32, 4], "data_offsets": [512, 1024]}},
    bytes(1024),
)

FOUND: dict[str, tuple[str, Case]] = {
    "a GGUF key that a terminal obeys": (
        "gguf",
        {"model.gguf": bytes(corpora.gguf([], {"\x1b[2J": (99, "<I", 1)}).data)},
    ),
    "a GGUF key that fills the screen": ("gguf", {"model.gguf": bytes(corpora.gguf([], {LONG: (99, "<I", 1)}).data)}),
    "a type of number that turns the text": (
        "adapter",
        adapter(LORA, header({NAME: {"dtype": "\u202eevil", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))),
    ),
    "a header that is quoted whole": ("adapter", adapter(LORA, header({NAME: LONG}))),
    "a module to save that is a NUL": ("adapter", adapter(LORA | {"modules_to_save": ["\0"]}, SAVED)),
    "a module to save without end": ("adapter", adapter(LORA | {"modules_to_save": [LONG]}, SAVED)),
    "a gate that a terminal obeys": (
        "recipe",
        {"recipe.yaml": (RECIPE + 'eval: {gates: {"lo\\u202es": {max: 1}}}\n').encode()},
    ),
    "a set of rows whose name fills the screen": (
        "recipe",
        {"recipe.yaml": RECIPE.replace("rows.jsonl", f'rows.jsonl, eval: {{? "o {LONG[:5000]}" : a.jsonl}}').encode()},
    ),
    # the time that PyYAML takes for one more bracket grows with the number of those that are open
    "brackets without end behind a key that is none": (
        "recipe",
        {"recipe.yaml": (RECIPE + "trainer: {? [a] : " + "[" * 4_000 + "]" * 4_000 + "}\n").encode()},
    ),
    "a role that a terminal obeys": ("data", rows('{"messages": [{"role": "u\\u001b[2J", "content": "x"}]}\n')),
    "a key twice that a terminal obeys": ("data", rows('{"\\u001b[2J": 1, "\\u001b[2J": 2}\n')),
    "two columns that turn the text": ("data", rows("\u202ea,\u202ea\n1,2\n", "rows.csv")),
    "one column with a name that a terminal obeys": ("data", rows("a\x1b|b\n1\n", "rows.csv")),
    "more text that a terminal obeys": ("data", rows('[{"text": "a"}] \x1b[2J', "rows.json")),
    "a tag that fills the screen": (
        "chat",
        {"chat.jinja": b"{% " + LONG.encode() + b" %}", "messages.json": b"[]"},
    ),
    "a speaker that a terminal obeys": (
        "data",
        rows('{"conversations": [{"from": "\\u001b[2J", "value": "x"}]}\n'),
    ),
    "a number with five thousand digits": (
        "chat",
        {"chat.jinja": b"{{ " + b"9" * 5_000 + b" }}", "messages.json": b"[]"},
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Target]:
    """Each target, made once."""
    return cache(lambda kind: TARGETS[kind](tmp_path_factory.mktemp(kind)))


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, made: Callable[[str], Target]):
    kind, case = FOUND[name]
    taken, wrong, seconds = with_verdict(made(kind), case)
    assert wrong is None, wrong
    assert not taken
    assert seconds < 0.5


@pytest.mark.parametrize(
    "name", ["a file without end", "a step that is a list", "a format of the screen", "a size that is a text"]
)
def test_found_in_checkpoints(name: str, made: Callable[[str], Target]):
    target = made("checkpoint")
    case = dict(target.mutator.corpus[0])
    manifest, state = json.loads(case["manifest.json"]), json.loads(case["state.json"])
    if name == "a file without end":
        manifest["files"][LONG] = {"size": 1, "sha256": ""}
    elif name == "a size that is a text":
        manifest["files"]["trainable.safetensors"]["size"] = "\x1b[2J"
    elif name == "a step that is a list":
        state["step"] = [LONG]
    else:
        state["format"] = "\x1b[2J" * 2_000
    case["state.json"] = json.dumps(state).encode()
    sha256 = hashlib.sha256(case["state.json"]).hexdigest()
    manifest["files"]["state.json"] = {"size": len(case["state.json"]), "sha256": sha256}
    case["manifest.json"] = json.dumps(manifest).encode()
    taken, wrong, _ = with_verdict(target, case)
    assert (taken, wrong) == (False, None)


def test_what_arrow_quotes_of_a_file_is_shown_and_not_obeyed():
    assert _first_line(OSError("Couldn't deserialize thrift: don't know what type: \x0f")).isprintable()


@pytest.mark.parametrize("place", ["model", "train"])
def test_a_home_of_nobody(place: str, tmp_path: Path):
    text = f"model: {{name_or_path: {'~nobody-at-all/m' if place == 'model' else 'm'}}}\nmethod: {{type: lora}}\n"
    text += f"dataset: {{train: {'~nobody-at-all/rows.jsonl' if place == 'train' else 'rows.jsonl'}}}\noutput: run\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert "~nobody-at-all" in str(recipes.read(tmp_path / "recipe.yaml"))
