"""How what is trained starts: fresh, planned on a look at the data, or from an adapter that is there already."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from peftctl.config.write import dump
from peftctl.engine.attach import adapters_of, attach, detach, methods
from peftctl.engine.disk import load, method_of
from peftctl.engine.method import Method
from peftctl.engine.peft_config import CONFIG, read_config
from peftctl.engine.sample import Sample
from peftctl.engine.tensor_file import FILES
from peftctl.errors import AdapterError, Problem
from peftctl.exports.companions import copy_files
from peftctl.models.base import Base
from peftctl.models.origin import ORIGIN, refuse_stranger
from peftctl.models.source import adapter
from peftctl.recipe import method_name, read_method
from peftctl.tasks.task import REFERENCE, Task
from peftctl.training.storage import staged
from peftctl.verbs.events import Listen, speaker
from peftctl.verbs.run_folder import RunFolder


def start(
    base: Base, method: Method, task: Task, sample: Sample, run: RunFolder | None, accelerator: Any, listen: Listen
) -> Method:
    """Attach what the recipe trains to `base`, as it starts; returns the method as planned.

    `run` is the folder of a run that is resumed: its plan and its own copy of what it started from are used again. One
    process plans for all. A `task` that compares with where training started keeps that attached.
    Raises AdapterError for an adapter to start from that is of another method or does not fit, RunError for one of
    another base; ModelError and StorageError for a hub id that cannot be had.
    """
    from accelerate.utils import broadcast_object_list

    model = base.model
    before = run.read_provenance().get("method") if run else None
    if before:
        method = read_method(before)
    else:
        outcome = [plan(model, method, sample) if accelerator.is_main_process else method]
        [planned] = broadcast_object_list(outcome) if accelerator.num_processes > 1 else outcome
        if isinstance(planned, AdapterError):  # every process says so: none waits for the one that planned
            raise planned
        method = planned
    for part in method.folders:
        refuse_stranger(Path(part), base.folder, base.name)
    folder = None
    if method.init_from:
        own = run.start if run and run.start.is_dir() else None
        folder = own or adapter(method.init_from, speaker(listen))
        refuse_other_method(folder, method)
        refuse_stranger(folder, base.folder, base.name)
        load(model, folder, REFERENCE)
    attach(model, method, sample=sample)
    if folder is not None:
        continue_from(model, folder)
        tell_changes(folder, methods(model)[REFERENCE], method, listen)
        if not task.needs_base:
            detach(model, REFERENCE)
    return method


def plan(model: nn.Module, method: Method, sample: Sample) -> Method | AdapterError:
    """The method as it is to be attached, or why it cannot be."""
    try:
        return method.planned(model, sample)
    except AdapterError as error:
        return error


def planned_record(planned: Method, method: Method) -> dict[str, Any]:
    """What a resumed run needs to know of the plan; empty where the recipe says it all."""
    return {} if planned == method else {"method": {"type": method_name(planned), **dump(planned)}}


def keep_start(method: Method, run: RunFolder, listen: Listen) -> None:
    """Copy what the run starts from into its folder, so that it can go on when that is gone."""
    if method.init_from and not run.start.exists():
        with staged(run.start) as folder:
            copy_files(adapter(method.init_from, speaker(listen)), folder, (CONFIG, *FILES, ORIGIN))


def refuse_other_method(folder: Path, method: Method) -> None:
    """Raise AdapterError when `folder` holds an adapter of another method."""
    kind = method_of(read_config(folder), str(folder / CONFIG))
    if kind is not type(method):
        text = f"{folder / CONFIG}: an adapter of `{kind.peft_type}`; the recipe trains `{method_name(method)}`"
        raise AdapterError(text)


def continue_from(model: nn.Module, folder: Path) -> None:
    """Give the adapters that are to be trained the state of those loaded from `folder`, which have to be as many."""
    new, old = adapters_of(model, "default"), adapters_of(model, REFERENCE)
    problems = [Problem(f"{folder}: `{site}` is adapted there and not here") for site in old.keys() - new.keys()]
    problems += [Problem(f"{folder}: `{site}` is adapted here and not there") for site in new.keys() - old.keys()]
    refused: dict[Problem, list[str]] = {}
    for site in sorted(new.keys() & old.keys()):
        try:
            new[site].continue_from(old[site])
        except AdapterError as error:
            for problem in error.problems:
                refused.setdefault(problem, []).append(site)
    for (text, hint), sites in refused.items():
        more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
        problems.append(Problem(f"{folder}: `{sites[0]}`{more}: {text}", hint))
    if methods(model)[REFERENCE].needs_quantised != methods(model)["default"].needs_quantised:
        text = f"{folder}: made up for the quantisation of its base, which this run does not, or the other way round"
        problems.append(Problem(text, "`init_weights: loftq` says that it does"))
    if problems:
        raise AdapterError.of(sorted(problems))


def tell_changes(folder: Path, then: Method, now: Method, listen: Listen) -> None:
    """Warn of numbers and switches in which `now` differs from `then`, in `folder`; where they sit has to agree."""
    pairs = [(field.name, getattr(then, field.name), getattr(now, field.name)) for field in fields(now)]
    known = [(name, a, b) for name, a, b in pairs if isinstance(a, bool | int | float) and b is not None]
    changed = [f"`{name}` was {a:g}, is {b:g}" for name, a, b in known if a != b]
    if changed:
        text = f"{folder}: made with other settings than this run's: {', '.join(changed)}"
        listen({"event": "warning", "text": text, "hint": None})
