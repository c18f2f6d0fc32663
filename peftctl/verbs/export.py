"""`peftctl export`: what a run is given away as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftctl.config.write import to_yaml
from peftctl.engine.disk import method_in
from peftctl.engine.peft_config import PEFT_TYPES
from peftctl.engine.tensor_file import WEIGHTS
from peftctl.errors import AdapterError, Problem, RecipeError, RunError
from peftctl.exports.card import Facts
from peftctl.exports.peft import export_peft
from peftctl.models.adapted import by_folder
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
    kind = refuse_damaged(found.adapter)
    if found.folder:
        facts = facts_of_run(found.folder, merged=False)
    else:
        base = found.model.name_or_path
        recipe = to_yaml({"model": {"name_or_path": base}})
        head, peft = by_folder(found.adapter), kind in PEFT_TYPES
        facts = Facts(base=base, method=f"`{kind}`", recipe=recipe, counts={}, head=head, peft=peft)
    return {"path": str(output), "format": format, **export_peft(found.adapter, Path(output), facts=facts)}


def refuse_damaged(adapter: Path) -> str:
    """HF PEFT's name of the method; AdapterError, with all that is wrong, for a folder that nobody could load."""
    from safetensors import safe_open

    method = method_in(adapter)
    with safe_open(adapter / WEIGHTS, "pt") as tensors:
        names = sorted(tensors.keys())
        broken = [name for name in names if not tensors.get_tensor(name).isfinite().all()]
    if broken:
        raise AdapterError.of([Problem(f"{adapter / WEIGHTS}: `{name}` is not finite") for name in broken])
    return method.peft_type
