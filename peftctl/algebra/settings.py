"""The settings of an adapter folder in the words of recipes, without those that say where it sits."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from peftctl.engine.disk import method_of
from peftctl.engine.method import Method
from peftctl.engine.peft_config import CONFIG, read_config
from peftctl.engine.tensor_file import shapes

PLACES = ("target_modules", "init_from", "adapters")
"""Fields that name modules or folders, which are told apart."""


def method_in(folder: Path) -> Method:
    """The method that `folder` describes. Raises AdapterError."""
    config, place = read_config(folder), str(folder / CONFIG)
    return method_of(config, place).from_peft(config, shapes(folder), place)


def settings(method: Method) -> dict[str, Any]:
    """Every setting."""
    return {f.name: getattr(method, f.name) for f in fields(method) if f.name not in PLACES}


def changed(method: Method) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    defaults = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(method)}
    return {name: value for name, value in settings(method).items() if value != defaults[name]}
