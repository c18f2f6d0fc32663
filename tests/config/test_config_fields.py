"""What the annotations and docstrings of blocks say to people and to editors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le, MaxLen
from config.example import Cargo, Diesel, Sail, Ship

from peftctl.config.block import Block, Count, Fraction, Positive, Probability
from peftctl.config.fields import Field, docstrings, fields
from peftctl.config.near import did_you_mean
from peftctl.config.schema import schema
from peftctl.config.words import type_words


def test_fields_of_a_class_and_of_its_bases() -> None:
    assert fields(Sail) == [
        Field("power", "number above 0", False, 300, "Power, in kilowatts."),
        Field("cylinders", "whole number of at least 1", False, 6, "Cylinders, all together."),
        Field("idle", "number from 0 to below 1", False, 0.0, ""),
        Field("area", "number above 0", True, None, "Area, in square metres."),
    ]
    assert docstrings(Diesel)["turbo"] == "Whether it has a turbocharger."
    assert "kind_of" not in [field.name for field in fields(Diesel)]


def test_defaults_are_plain_data() -> None:
    found = {field.name: field for field in fields(Ship)}
    assert found["engine"].default == {"power": 300, "cylinders": 6, "idle": 0.0, "turbo": False, "marks": {}}
    assert found["size"].default == [10.0, 3.0]
    assert (found["ports"].required, found["ports"].default) == (False, None)
    assert (found["name"].required, found["name"].default) == (True, None)
    json.dumps([field._asdict() for field in fields(Ship)])


def test_a_class_without_source_has_no_docstrings() -> None:
    made: dict[str, Any] = {}
    exec("@dataclass\nclass Typed:\n    a: int = 1\n    'doc'\n", {"dataclass": dataclass, "__name__": __name__}, made)
    assert fields(made["Typed"]) == [Field("a", "whole number", False, 1, "")]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (str, "text"),
        (float, "number"),
        (int | None, "whole number"),
        (bool, "true or false"),
        (str | list[str] | None, "text or list of texts"),
        (Literal["a", "b"], "one of a, b"),
        (Literal["auto"] | Count, "auto or whole number of at least 1"),
        (int | list[int] | None, "whole number or list of whole numbers"),
        (Positive, "number above 0"),
        (Fraction, "number from 0 to 1"),
        (Probability, "number from 0 to below 1"),
        (Annotated[int, Le(5)], "whole number of at most 5"),
        (Annotated[Annotated[int, Ge(2)], Le(5)], "whole number from 2 to 5"),
        (dict[str, Count], "mapping of names to whole numbers"),
        (dict[str, str | list[str]], "mapping of names to texts or lists of texts"),
        (list[Literal["x", "y"]], "list of any of x, y"),
        (tuple[int, int], "list of 2 whole numbers"),
        (tuple[str, ...], "list of texts"),
        (str | Cargo | list[str | Cargo], "text, mapping or list of texts or mappings"),
        (list, "list"),
        (dict, "mapping"),
        (Any, "anything"),
    ],
)
def test_types_in_words(annotation: Any, words: str) -> None:
    assert type_words(annotation) == words


def test_the_schema() -> None:
    found = schema(Ship, "a ship's recipe")
    assert json.loads(json.dumps(found)) == found
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert found["title"] == "a ship's recipe"
    assert found["description"] == "A ship."
    assert (found["type"], found["additionalProperties"], found["required"]) == ("object", False, ["name"])
    assert found["properties"] == {
        "name": {"type": "string", "description": "What it is called."},
        "engine": {"$ref": "#/$defs/engine", "description": "What drives it."},
        "spare": {"anyOf": [{"$ref": "#/$defs/Engine"}, {"type": "null"}], "default": None},
        "boat": {"$ref": "#/$defs/Diesel"},
        "mast": {"type": "string", "default": "oak"},
        "flag": {"enum": ["none", "red", "green"], "description": "Its flag.", "default": "none"},
        "crew": {
            "anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}],
            "description": "Sailors.",
            "default": "auto",
        },
        "ports": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}],
            "description": "Where it calls.",
            "default": None,
        },
        "cargo": {
            "anyOf": [
                {"type": "string"},
                {"$ref": "#/$defs/Cargo"},
                {"type": "array", "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Cargo"}]}},
                {"$ref": "#/$defs/Share"},
                {"type": "null"},
            ],
            "description": "What it carries.",
            "default": None,
        },
        "decks": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}], "default": 1},
        "size": {
            "type": "array",
            "prefixItems": [{"type": "number"}, {"type": "number"}],
            "minItems": 2,
            "maxItems": 2,
            "description": "Length and width, in metres.",
            "default": [10.0, 3.0],
        },
        "stops": {"type": "array", "items": {"type": "string"}, "default": []},
        "labels": {"type": "array", "items": {"type": "string"}, "description": "Labels.", "default": []},
        "watches": {"type": "array", "minItems": 1, "items": {"type": "string"}, "default": ["first"]},
        "lights": {
            "type": "object",
            "propertyNames": {"enum": ["port", "starboard"]},
            "additionalProperties": {"type": "string"},
            "default": {},
        },
        "afloat": {"type": "boolean", "default": True},
        "speed": {"type": "number", "description": "Speed, in knots.", "default": 1e-4},
        "number": {"type": "integer", "default": 0},
        "draught": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None},
        "hold": {"anyOf": [{"$ref": "#/$defs/Cargo"}, {"type": "null"}], "default": None},
    }
    assert set(found["$defs"]) == {"Engine", "Diesel", "Cargo", "Share"}
    assert found["$defs"]["Cargo"] == {
        "type": "object",
        "properties": {
            "path": {"type": "string", "description": "Where it lies."},
            "weight": {
                "type": "number",
                "exclusiveMinimum": 0,
                "description": "Weight, in tonnes.",
                "default": 1.0,
            },
        },
        "required": ["path"],
        "additionalProperties": False,
    }
    diesel = found["$defs"]["Diesel"]["properties"]
    assert diesel["power"]["description"] == "Power, in kilowatts."  # from the class above
    assert diesel["marks"]["additionalProperties"] == {"type": "integer", "minimum": 1}


@dataclass(frozen=True, kw_only=True)
class Tree(Block):
    """A tree."""

    name: Annotated[str, MaxLen(9)]
    branches: list[Tree] | None = None


def test_a_block_within_itself() -> None:
    found = schema(Tree, "tree")
    assert found["properties"]["name"] == {"type": "string", "maxLength": 9}
    branches = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/Tree"}}, {"type": "null"}], "default": None}
    assert found["properties"]["branches"] == found["$defs"]["Tree"]["properties"]["branches"] == branches


@pytest.mark.parametrize(
    ("name", "candidates", "hint"),
    [
        ("quantise", ["quantization", "dtype"], "did you mean `quantization`?"),
        ("LoRA", ["ia3", "lora"], "did you mean `lora`?"),
        ("target-modules", ["modules_to_save", "target_modules"], "did you mean `target_modules`?"),
        ("zzz", ["a", "b"], None),
        ("zzz", [], None),
        ("", ["a"], None),
        ("a" * 200_000, ["a" * 90], "did you mean `" + "a" * 90 + "`?"),
    ],
)
def test_did_you_mean(name: str, candidates: list[str], hint: str | None) -> None:
    assert did_you_mean(name, candidates) == hint


@pytest.mark.parametrize("module", ["peftctl.config", "peftctl.config.block", "peftctl.config.near"])
def test_what_every_room_imports_is_light(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'pydantic', 'yaml', 'torch'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
