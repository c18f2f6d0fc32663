"""The smallest useful settings of every method, and which of the common promises it makes; one entry a method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tiny import MORE, ZOO


@dataclass(frozen=True)
class Setting:
    """How the contract tries one method."""

    fields: dict[str, Any] = field(default_factory=dict)
    zoo: tuple[str, ...] = (*ZOO, *MORE)
    """Shapes that it can be attached to."""
    starts_at_base: bool = True
    """Whether an untrained adapter changes nothing; prompts do not promise it."""
    learning_rate: float = 2e-2
    """For the contract's sixty steps."""
    merges: bool = True
    scalable: bool = False
    """Whether `activate` may give it a weight other than 1."""
    quantised: bool = True
    """Whether it stands around 4-bit hosts."""
    host_level: bool = True
    """Whether each row of a batch may use its own adapter."""


SETTINGS: dict[str, Setting] = {
    "delta_lora": Setting({"r": 4, "alpha": 8}, scalable=True),
    "dora": Setting({"r": 4}),
    "gralora": Setting({"r": 4, "hybrid_r": 2, "alpha": 6}, scalable=True),
    "lora": Setting({"r": 4}, scalable=True),
    "mora": Setting({"r": 4}, scalable=True),
    "qalora": Setting({"r": 4, "alpha": 8, "group_size": 4}, scalable=True),
    "vera": Setting({"r": 32}, scalable=True),
}
