"""What another run measured earlier, for gates that compare with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peftctl.engine.tensor_file import WEIGHTS
from peftctl.errors import Problem, RunError
from peftctl.evaluation import rows_file
from peftctl.evaluation.gate import BASE, Gate, split_key
from peftctl.evaluation.sheet import Sheet
from peftctl.verbs import provenance
from peftctl.verbs.run_folder import RunFolder


def earlier(
    gates: Mapping[str, Gate], rows: Mapping[str, Sequence[str]], command: Callable[[str], str]
) -> dict[str, dict[str, Sheet]]:
    """The sheets of every run that a gate compares with, by its folder and eval set.

    `rows` are the digests of the rows to be measured, in order, by eval set; `command` says what to run for a folder
    that was not measured like this. Raises RunError with every gate that has nothing to compare with.
    """
    found: dict[str, dict[str, Sheet]] = {}
    problems: list[Problem] = []
    for key, gate in gates.items():
        compares = any(limit.bounds != "figure" for limit in gate.limits)
        if not compares or gate.reference == BASE:
            continue
        folder = gate.reference
        again = f"measure it like this one: `{command(folder)}`"
        try:
            if folder not in found:
                found[folder] = sheets_of(RunFolder(folder), again)
            wanted, metric = split_key(key)
            for name in rows if wanted is None else [wanted] if wanted in rows else []:
                if why := misfit(found[folder], name, metric, rows[name]):
                    raise RunError(f"{folder}: {why}", again)
        except RunError as error:
            problems += [Problem(f"eval.gates.{key}: {text}", hint) for text, hint in error.problems]
    if problems:
        raise RunError.of(problems)
    return found


def sheets_of(folder: RunFolder, again: str) -> dict[str, Sheet]:
    """What `peftctl eval` left in a run folder about its own adapter. Raises RunError when there is nothing."""
    if not folder.finished:
        raise RunError(f"{folder.path}: no finished run is here", "`against` is `base` or the folder of a run")
    path = folder.path / rows_file.NAME
    if not path.is_file():
        raise RunError(f"{folder.path}: was never evaluated", again)
    if folder.read_json(folder.evaluation).get("adapter_sha256") != provenance.file_digest(folder.adapter / WEIGHTS):
        raise RunError(f"{folder.path}: another adapter than its own was evaluated there last", again)
    return rows_file.read(path)


def misfit(sheets: Mapping[str, Sheet], name: str, metric: str, rows: Sequence[str]) -> str | None:
    """Why a run cannot be compared by `metric` on these rows; None when it can."""
    if name not in sheets:
        return f"was not evaluated on `{name}`" if name else "was evaluated on rows with a name"
    if list(sheets[name].rows) != list(rows):
        return "was evaluated on other rows" + (f" than those of `{name}`" if name else "")
    if metric not in sheets[name].statistics.get(model_of(sheets[name]), {}):
        return f"`{metric}` was not measured there"
    return None


def model_of(sheet: Sheet) -> str:
    """The model of a run that is compared with: the last that was measured, its adapter."""
    return list(sheet.statistics)[-1] if sheet.statistics else ""
