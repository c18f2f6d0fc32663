"""Which modules a stranger's adapter_config.json implies: read from names alone, no pattern of theirs is ever run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from peftctl.engine.anatomy import modules, under


def left_out(model: nn.Module, config: Mapping[str, Any], adapted: Collection[str]) -> Iterator[str]:
    """Modules of `model` that the list `target_modules` of a config names, by PEFT's rules, and that are not `adapted`.

    An entry that is a module's full name means that module alone, as where we wrote it. Silent where the config picks
    in other ways too: by a pattern, by exclusion, by number of the block.
    """
    entries = config.get("target_modules")
    picky = any(config.get(key) not in (None, [], "") for key in ("exclude_modules", "layers_to_transform"))
    if not isinstance(entries, list) or picky:
        return
    wanted = {entry for entry in entries if isinstance(entry, str)}
    saved = [name for name in config.get("modules_to_save") or [] if isinstance(name, str)]
    names = [site.name for site in modules(model)]
    endings = wanted.difference(names)
    for name in names:
        parts = name.split(".")
        named = name in wanted or any(".".join(parts[start:]) in endings for start in range(1, len(parts)))
        if named and name not in adapted and not any(under(name, entry) for entry in saved):
            yield name
