"""`peftctl export`: what a run is given away as."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peftctl.engine.disk import CONFIG, WEIGHTS
from peftctl.errors import RecipeError, RunError
from peftctl.exports.card import card
from peftctl.training import storage
from peftctl.verbs.events import Listen, silent
from peftctl.verbs.facts import facts_of_run
from peftctl.verbs.merge import merge
from peftctl.verbs.target import open_target

FORMATS = ("peft", "safetensors")


def export(target: str, output: str | Path, *, format: str | None = None, listen: Listen = silent) -> dict[str, Any]:
    """Write the run `target` into the folder `output`, all or nothing: `peft`, the adapter; `safetensors`, merged.

    Raises PeftctlError.
    """
    found = open_target(target)
    if found.adapter is None:
        raise RunError(f"{target}: there is no adapter to export", "train first")
    format = format or (found.recipe.export.format if found.recipe else "peft")
    if format not in FORMATS:
        raise RecipeError(f"format: expected one of {', '.join(FORMATS)}; got `{format}`")
    if format == "safetensors":
        return {"format": format, **merge(target, output, listen=listen)}
    with storage.staged(Path(output)) as staged:
        for name in (CONFIG, WEIGHTS, "chat_template.jinja", "README.md"):
            if (found.adapter / name).is_file():
                shutil.copyfile(found.adapter / name, staged / name)
        if found.folder is not None:
            (staged / "README.md").write_text(card(facts_of_run(found.folder, merged=False)), encoding="utf-8")
    return {"path": str(output), "format": format}
