"""The settings of an adapter folder in the words of recipes, without those that say where it sits."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from peftctl.engine.method import Method

PLACES = ("target_modules", "init_from", "adapters")
"""Fields that name modules or folders, which are told apart."""


def settings(method: Method) -> dict[str, Any]:
    """Every setting."""
    return {f.name: getattr(method, f.name) for f in fields(method) if f.name not in PLACES}


def changed(method: Method) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    defaults = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(method)}
    return {name: value for name, value in settings(method).items() if value != defaults[name]}
