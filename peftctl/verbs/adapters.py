"""`peftctl adapters`: look into adapter folders, compare them, and make new ones of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftctl.algebra.combine import COMBINE, How, combined
from peftctl.algebra.convert import converted
from peftctl.algebra.diff import difference
from peftctl.algebra.inspection import inspected
from peftctl.algebra.lora_folder import LoRAFolder, read_lora_folder, write_lora_folder
from peftctl.algebra.resize import resized
from peftctl.engine.peft_config import CONFIG, read_config
from peftctl.errors import AdapterError, Problem, RecipeError, RunError
from peftctl.models.folder import read_json
from peftctl.models.origin import ORIGIN, refuse_stranger
from peftctl.models.source import adapter as find_adapter
from peftctl.models.source import local
from peftctl.verbs.events import Listen, silent, speaker, ticker


def inspect(target: str, *, listen: Listen = silent) -> dict[str, Any]:
    """What is in an adapter: facts, settings, and of a LoRA the figures of every update. Raises PeftctlError."""
    return inspected(folder_of(target, listen))


def diff(first: str, second: str, *, listen: Listen = silent) -> dict[str, Any]:
    """How far apart two LoRAs are. Raises PeftctlError."""
    a, b = (read_lora_folder(folder_of(target, listen)) for target in (first, second))
    return {"path": str(a.place), "other": str(b.place), **difference(a, b)}


def combine(
    targets: Sequence[str],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: str = "linear",
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    listen: Listen = silent,
) -> dict[str, Any]:
    """Write several LoRAs of one base as one into `output`, all or nothing, and return the report.

    `weights` are equal shares of one when None. Raises PeftctlError.
    """
    shares = [1 / len(targets)] * len(targets) if weights is None else list(weights)
    problems = []
    if how not in COMBINE:
        problems.append(Problem(f"how: expected one of {', '.join(COMBINE)}; got `{how}`"))
    if r is not None and how in ("linear", "cat"):
        problems.append(Problem(f"r: `{how}` has the rank that it needs", "leave it out, or use `svd`"))
    if len(shares) != len(targets):
        problems.append(Problem(f"weights: expected {len(targets)} numbers, one an adapter; got {len(shares)}"))
    if not any(shares):
        problems.append(Problem("weights: all are zero"))
    if not 0 < density <= 1:
        problems.append(Problem(f"density: expected a number above 0, up to 1; got {density:g}"))
    if problems:
        raise RecipeError.of(problems)
    adapters = [read_lora_folder(folder_of(target, listen)) for target in targets]
    check_bases(adapters, listen)
    chosen: How = how  # type: ignore[assignment]
    options: dict[str, Any] = {"r": r, "density": density, "seed": seed, "progress": ticker(listen, "combining")}
    result, report = combined(adapters, shares, chosen, **options)
    made = {"how": how, "weights": shares, "adapters": [str(adapter.place) for adapter in adapters]}
    return written(result, output, made | report, listen)


def resize(target: str, output: str | Path, *, r: int, seed: int = 0, listen: Listen = silent) -> dict[str, Any]:
    """Write a LoRA with rank `r` into `output`, all or nothing, and return the report. Raises PeftctlError."""
    result, report = resized(read_lora_folder(folder_of(target, listen)), r, seed)
    return written(result, output, report, listen)


def convert(
    target: str, output: str | Path, *, r: int, base: str | None = None, listen: Listen = silent
) -> dict[str, Any]:
    """Write an adapter of another method as a LoRA of rank `r` into `output`, all or nothing, and return the report.

    `base` is another name or path of its base model. Raises PeftctlError.
    """
    folder = folder_of(target, listen)
    name = base or read_config(folder).get("base_model_name_or_path")
    if not name:
        raise RunError(f"{folder}: its config names no base model", "give one with `--base`")
    place = local(str(name), say=speaker(listen))
    refuse_stranger(folder, place, str(name))
    result, report = converted(folder, place, r, ticker(listen, "converting"))
    return written(result, output, report, listen)


def folder_of(target: str, listen: Listen) -> Path:
    """An adapter's folder: itself, that of a run, or a hub id's."""
    path = find_adapter(target, speaker(listen))
    inside = path / "adapter"
    return inside if (inside / CONFIG).is_file() and not (path / CONFIG).is_file() else path


def check_bases(adapters: Sequence[LoRAFolder], listen: Listen) -> None:
    """Raise AdapterError for adapters that remember different bases; warn of those that only name different ones."""
    first = next((adapter for adapter in adapters if remembered(adapter)), adapters[0])
    for other in adapters:
        mine, theirs = remembered(first), remembered(other)
        known = [key for key in ("config", "weights") if key in mine and key in theirs]
        if any(mine[key] != theirs[key] for key in known):
            text = f"{other.place}: trained on another base than {first.place}"
            raise AdapterError(text, "only adapters of one base can be combined")
        if not known and first.base and other.base and first.base != other.base:
            text = f"{other.place}: its base is `{other.base}`, that of {first.place} is `{first.base}`"
            listen({"event": "warning", "text": text, "hint": "right only when both names mean the same model"})


def remembered(adapter: LoRAFolder) -> Mapping[str, Any]:
    """What the folder remembers of its base; most say nothing."""
    base = (
        read_json(adapter.place / ORIGIN, str(adapter.place)).get("base") if (adapter.place / ORIGIN).is_file() else {}
    )
    return base if isinstance(base, dict) else {}


def written(adapter: LoRAFolder, output: str | Path, report: dict[str, Any], listen: Listen) -> dict[str, Any]:
    """Write the folder, tell what was kept in a few lines, and return all of it."""
    size = write_lora_folder(adapter, Path(output))
    ranks = [site["rank"] for site in report["sites"]]
    least = min(report["sites"], key=lambda site: float(site["energy"]))
    kept = f"{report['energy']:.2%}"
    if least["energy"] < 0.99995:
        kept += f"; least at {least['site']}: {least['energy']:.2%}"
    rows = [
        ["sites", f"{len(ranks)}"],
        ["rank", f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"],
        ["energy kept", kept],
    ]
    listen({"event": "table", "title": "written", "columns": ["LoRA", "figure"], "rows": rows})
    return {"path": str(output), "bytes": size, **report}
