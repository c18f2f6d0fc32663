"""The smallest useful settings of every method, and which of the common promises it makes; one entry a method."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from tiny import MORE, ZOO, build, stir

from peftctl import METHODS, attach, save
from peftctl.engine.method import Method


@dataclass(frozen=True)
class Setting:
    """How the contract tries one method."""

    fields: dict[str, Any] = field(default_factory=dict)
    on: Callable[[str], dict[str, Any]] = lambda shape: {}
    """Further ones for a shape: folders of what was trained on it."""
    zoo: tuple[str, ...] = (*ZOO, *MORE)
    """Shapes that it can be attached to."""
    starts_at_base: bool = True
    """Whether an untrained adapter changes nothing; prompts do not promise it."""
    learning_rate: float = 2e-2
    """For the contract's sixty steps."""
    leaves: float = 0.95
    """Share of the loss that they may leave; a method with few parameters fits random labels slowly."""
    merges: bool = True
    scalable: bool = False
    """Whether `activate` may give it a weight other than 1."""
    quantised: bool = True
    """Whether it stands around 4-bit hosts."""
    host_level: bool = True
    """Whether each row of a batch may use its own adapter."""
    replaces: bool = False
    """Whether the last of several active adapters runs alone."""
    fits_any: bool = False
    """Whether its tensors fit every model of the same width, so that their shapes tell bases apart no further."""
    in_place: bool = False
    """Whether it trains the base itself, and refuses what needs the base as it was."""


@cache
def two_bottlenecks(shape: str) -> list[str]:
    """Folders of two bottlenecks trained on a model of the zoo."""
    folders = [Path(mkdtemp(prefix="bottlenecks-")) for _ in range(2)]
    for seed, folder in enumerate(folders):
        atexit.register(rmtree, folder)
        method = METHODS["bottleneck"](variant="houlsby", reduction_factor=1 << seed)
        model = attach(build(shape), method)
        stir(model, seed)
        save(model, folder)
    return [str(folder) for folder in folders]


READERS = ("llama", "gpt2", "t5", "bert", "mixtral")
"""What reads tokens, and so can read virtual ones."""

VIRTUAL: dict[str, Any] = {"starts_at_base": False, "leaves": 0.998, "merges": False, "host_level": False}
"""What methods of virtual tokens have in common."""


SETTINGS: dict[str, Setting] = {
    "adalora": Setting({"init_r": 6, "target_r": 4, "alpha": 24}, scalable=True),
    "bitfit": Setting(zoo=("gpt2", "bert", "vit"), learning_rate=1e-1),
    "bottleneck": Setting({"variant": "houlsby", "reduction_factor": 4, "scale": 2.0}, merges=False),
    "delta_lora": Setting({"r": 4, "alpha": 8}, scalable=True),
    "dora": Setting({"r": 4}),
    "fusion": Setting(
        on=lambda shape: {"adapters": two_bottlenecks(shape)}, starts_at_base=False, leaves=0.97, merges=False
    ),
    "gralora": Setting({"r": 4, "hybrid_r": 2, "alpha": 6}, scalable=True),
    "full": Setting(quantised=False, host_level=False, in_place=True, learning_rate=2e-3),
    "ia3": Setting(learning_rate=0.5, leaves=0.99),
    "layers": Setting({"top": 1, "norms": True, "heads": True}, quantised=False, host_level=False, replaces=True),
    "lora": Setting({"r": 4}, scalable=True),
    "mora": Setting({"r": 4}, scalable=True),
    "oft": Setting({"block_size": 8}, leaves=0.985),  # a rotation of weights near zero, as of BERT's head, does little
    "p_tuning": Setting({"num_virtual_tokens": 4}, zoo=READERS, learning_rate=3e-2, fits_any=True, **VIRTUAL),
    "prefix": Setting({"num_virtual_tokens": 4}, zoo=READERS, learning_rate=1e-1, **VIRTUAL),
    "prompt": Setting({"num_virtual_tokens": 4}, zoo=READERS, learning_rate=1e-1, fits_any=True, **VIRTUAL),
    "qalora": Setting({"r": 4, "alpha": 8, "group_size": 4}, scalable=True),
    "reft": Setting({"r": 4, "first": 2, "last": 3}, merges=False, host_level=False),
    "vera": Setting({"r": 32}, scalable=True),
}


def made(method: str, shape: str = "llama") -> Method:
    """The method as it is tried on a model of the zoo."""
    setting = SETTINGS[method]
    return METHODS[method](**setting.fields, **setting.on(shape))
