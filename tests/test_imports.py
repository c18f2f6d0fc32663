"""Imports run one way: no room knows those that stand on it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "peftctl"
ROOMS = [
    {"errors"},
    {"config"},
    {"engine"},
    {"methods", "bundled"},
    {"models", "data"},
    {"fast"},
    {"tasks"},
    {"evaluation"},
    {"training"},
    {"exports"},
    {"algebra"},
    {"recipe"},
    {"planning"},
    {"verbs"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.stem in FLOOR)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "peftctl" and len(parts) > 1 and parts[1] in FLOOR:
                same, below = parts[1] == room(path), FLOOR[parts[1]] < FLOOR[room(path)]
                assert same or below, f"{path}:{node.lineno} imports {name}, which stands on it"


def test_every_room_is_known():
    names = {item.stem for item in PACKAGE.iterdir() if item.suffix == ".py" or (item / "__init__.py").is_file()}
    assert names - set(FLOOR) <= {"__init__", "__main__"}
    assert not {"utils", "helpers", "common", "misc"} & {file.stem for file in PACKAGE.rglob("*")}


def test_engine_needs_torch_and_safetensors_alone():
    allowed = {"torch", "safetensors", "peftctl", "bitsandbytes"}
    for path in (PACKAGE / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                for name in names:
                    top = name.split(".")[0]
                    assert top in allowed or top in sys.stdlib_module_names, f"{path}: {name}"
