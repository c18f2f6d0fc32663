"""`method.init_from`: a run that goes on from an adapter that is there already."""

from __future__ import annotations

from dataclasses import fields

from torch import nn

from peftctl.engine.disk import method_of, read_into, shapes
from peftctl.engine.method import Method
from peftctl.engine.peft_config import CONFIG, read_config
from peftctl.errors import AdapterError
from peftctl.models.source import adapter
from peftctl.recipe import method_name
from peftctl.verbs.events import Listen, speaker


def start_from(model: nn.Module, method: Method, listen: Listen) -> None:
    """Fill the attached adapter with the one that `method.init_from` names; warn of what else was set when it was made.

    Raises AdapterError for an adapter of another method, and for tensors that do not fit; ModelError and StorageError
    for a hub id that cannot be had.
    """
    assert method.init_from is not None
    folder = adapter(method.init_from, speaker(listen))
    config, place = read_config(folder), str(folder / CONFIG)
    kind = method_of(config, place)
    if kind is not type(method):
        raise AdapterError(f"{place}: an adapter of `{kind.peft_type}`; the recipe trains `{method_name(method)}`")
    read_into(model, folder)
    changed = unlike(kind.from_peft(config, shapes(folder), place), method)
    if changed:
        text = f"{folder}: made with other settings than this run's: {', '.join(changed)}"
        listen({"event": "warning", "text": text, "hint": None})


def unlike(then: Method, now: Method) -> list[str]:
    """The numbers and switches in which two of one method differ; where it sits shows in its tensors."""
    pairs = [(field.name, getattr(then, field.name), getattr(now, field.name)) for field in fields(now)]
    known = [(name, a, b) for name, a, b in pairs if isinstance(a, bool | int | float)]
    return [f"`{name}` was {a:g}, is {b:g}" for name, a, b in known if a != b]
