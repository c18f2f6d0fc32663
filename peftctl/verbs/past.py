"""What another run measured earlier, for gates that compare with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from peftctl.errors import Problem, RunError
from peftctl.evaluation import rows_file
from peftctl.evaluation.gate import BASE, Gate, split_key
from peftctl.evaluation.sheet import Sheet
from peftctl.verbs.run_folder import RunFolder


def earlier(gates: Mapping[str, Gate], rows: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Sheet]]:
    """The sheets of every run that a gate compares with, by its folder and eval set.

    `rows` are the digests of the rows to be measured, in order, by eval set. Raises RunError with every gate that has
    nothing to compare with, and what to run.
    """
    found: dict[str, dict[str, Sheet]] = {}
    problems: list[Problem] = []
    for key, gate in gates.items():
        compares = any(limit.bounds != "figure" for limit in gate.limits)
        if not compares or gate.reference == BASE:
            continue
        folder = gate.reference
        try:
            if folder not in found:
                found[folder] = sheets_of(Path(folder))
            wanted, metric = split_key(key)
            for name in rows if wanted is None else [wanted] if wanted in rows else []:
                fits(found[folder], folder, name, metric, rows[name])
        except RunError as error:
            problems += [Problem(f"eval.gates.{key}: {text}", hint) for text, hint in error.problems]
    if problems:
        raise RunError.of(problems)
    return found


def sheets_of(folder: Path) -> dict[str, Sheet]:
    """What `peftctl eval` left in a run folder. Raises RunError when there is nothing."""
    path = folder / rows_file.NAME
    if path.is_file():
        return rows_file.read(path)
    if not RunFolder(folder).exists:
        raise RunError(f"{folder}: no run is here", "`against` is `base` or the folder of a run")
    raise RunError(f"{folder}: was never evaluated", f"`peftctl eval {folder}` first")


def fits(sheets: Mapping[str, Sheet], folder: str, name: str, metric: str, rows: Sequence[str]) -> None:
    """Raise RunError when a run was not measured by `metric` on these rows."""
    again = f"`peftctl eval {folder} --data {f'{name}=' if name else ''}FILE --metrics {metric}` on the same rows"
    what = f"the eval set `{name}`" if name else "these rows"
    if name not in sheets:
        raise RunError(f"{folder}: was not evaluated on {what}", again)
    if list(sheets[name].rows) != list(rows):
        raise RunError(f"{folder}: was evaluated on other rows than {what} hold now", again)
    if metric not in next(iter(reversed(sheets[name].statistics.values())), {}):
        raise RunError(f"{folder}: `{metric}` was not measured there", again)


def model_of(sheet: Sheet) -> str:
    """The model of a run that is compared with: its adapter, or the base where it measured that alone."""
    return list(sheet.statistics)[-1]
