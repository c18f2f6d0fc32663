"""Fold adapters into the weights of their hosts, and take that back bit for bit.

Subtracting an update again would not do: in bfloat16 it changes most of the weights. The bits are kept instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from peftctl.engine.adapter import Adapter, Stack
from peftctl.engine.attach import methods, put, stacks, take_off
from peftctl.engine.hosts import is_quantised
from peftctl.engine.method import Method
from peftctl.errors import AdapterError, NotMergeable, Problem


class Kept(NamedTuple):
    """What `unmerge` needs: everything that `merge` replaced."""

    parameters: dict[str, nn.Parameter]
    adapters: list[tuple[str, str, Adapter]]
    """Host, adapter name, adapter; in the order of their stacks."""
    methods: dict[str, Method]
    active: dict[str, tuple[str, ...]]
    """Host -> its active adapters, in order."""
    tied: bool


@torch.no_grad()
def merge(model: nn.Module, keep: bool = False) -> nn.Module:
    """Fold the active adapters into the weights of their hosts; `model` is then a plain model again.

    With `keep` the weights as they were, and the adapters, are kept in memory for `unmerge`. A tied output head keeps
    its own weight when its embedding was adapted otherwise than it, or the other way round.
    Raises NotMergeable, before anything has changed, for hosts stored in 4 or 8 bits and for adapters that are
    more than a change of weights.
    """
    refuse_quantised(model)
    new = {
        f"{site}.{name}" if site else name: value
        for site, host, stack in stacks(model)
        for name, value in folded(host, stack).items()
    }
    if keep:
        vars(model)["peft_merged"] = kept(model, new)
    for name, parameter in shared(model, new).items():
        replace(model, name, parameter)
    untie(model)
    for adapter in methods(model):
        take_off(model, adapter)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge(model, keep=True)`: every weight has its old bits again, and the adapters stand where they stood.

    Raises AdapterError when nothing was kept.
    """
    before: Kept | None = vars(model).pop("peft_merged", None)
    if before is None:
        raise AdapterError("unmerge: nothing was kept of this model", "merge it with `merge(model, keep=True)`")
    if methods(model):
        vars(model)["peft_merged"] = before
        raise AdapterError("unmerge: other adapters have been attached since", "detach them first")
    for name, parameter in before.parameters.items():
        replace(model, name, parameter)
    if before.tied:
        model.config.tie_word_embeddings = True  # type: ignore[union-attr]
    for site, name, adapter in before.adapters:
        put(model.get_submodule(site), adapter, name)
    for site, _, stack in stacks(model):
        stack.active = before.active[site]
    vars(model)["peft_methods"] = before.methods
    return model


def kept(model: nn.Module, names: Iterable[str]) -> Kept:
    """What merging replaces: the parameters `names`, every adapter, and which of them are active."""
    adapters = [(site, name, stack[name]) for site, _, stack in stacks(model) for name in stack]
    active = {site: stack.active for site, _, stack in stacks(model)}
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    parameters = {name: model.get_parameter(name) for name in names}
    return Kept(parameters, adapters, methods(model), active, tied)  # type: ignore[arg-type]


def chosen(stack: Stack) -> list[tuple[str, Adapter]]:
    """The active adapters of one host, in order."""
    return [(name, stack[name]) for name in stack.active]  # type: ignore[misc]


def replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put `parameter` where the model has one called `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def shared(model: nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """`values` as parameters; what was one parameter of `model`, and has one value still, stays one."""
    made: dict[str, nn.Parameter] = {}
    first: dict[int, nn.Parameter] = {}
    for name, value in values.items():
        new = nn.Parameter(value, requires_grad=False)
        known = first.setdefault(id(model.get_parameter(name)), new)
        made[name] = known if torch.equal(known, new) else new
    return made


def folded(host: nn.Module, stack: Stack) -> dict[str, torch.Tensor]:
    """The parameters of `host` that its active adapters change, after every one of them, by name below it."""
    before = {n: p.detach() for n, p in host.named_parameters() if ".adapters." not in f".{n}"}
    values = before
    for _, adapter in chosen(stack):
        values = {n: adapter.merged(value, n) for n, value in values.items()}
    return {n: value for n, value in values.items() if value is not before[n]}


def refuse_quantised(model: nn.Module) -> None:
    """Raise NotMergeable when an active adapter stands around a host stored in 4 or 8 bits, or fits no other."""
    active = {name for _, _, stack in stacks(model) for name in stack.active}
    problems = [
        Problem(
            f"adapter `{name}`: it makes up for the quantisation that it was trained on", "keep it beside that base"
        )
        for name in sorted(active)
        if methods(model)[name].needs_quantised
    ]
    problems += [
        Problem(f"`{site}`: its weight is stored in 4 or 8 bits", "merge into the unquantised base: `peftctl merge`")
        for site, host, stack in stacks(model)
        if stack.active and is_quantised(host)
    ]
    if problems:
        raise NotMergeable.of(problems)


def untie(model: nn.Module) -> None:
    """Say in the model's configuration that embedding and output head no longer share one weight, when so."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    ends = [getattr(model, f"get_{end}_embeddings")() for end in ("input", "output")]
    if len({id(end.weight) for end in ends if end is not None}) > 1:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
