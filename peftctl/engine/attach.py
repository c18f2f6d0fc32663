"""Put a method's adapters around the modules of a model, switch them, take them off.

The model object stays the user's: its class, its keys, its `generate`. An adapted module gets a child `adapters`
and an instance attribute `forward`, both gone after `detach`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any, cast

import torch
from torch import nn

from peftctl.config.quote import quoted
from peftctl.engine.adapter import Adapter, Stack
from peftctl.engine.hosts import device
from peftctl.engine.method import Method
from peftctl.engine.sample import Sample
from peftctl.errors import AdapterError, Problem

NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


def attach(model: nn.Module, method: Method, name: str = "default", sample: Sample | None = None) -> nn.Module:
    """Freeze `model` and put `method`'s adapters around its modules, in place; they become the active ones.

    `sample` is what some ways to start look at: the tokenizer, a few batches of rows.
    Raises AdapterError when a target matches nothing, the name is taken, or a start needs a sample and there is none.
    """
    if not NAME.fullmatch(name) or hasattr(Stack(), name):
        hint = "up to 100 letters, digits, `_` and `-`, and no word that torch's modules use, such as `forward`"
        raise AdapterError(f"adapter name {quoted(name)}: not allowed", hint)
    if name in methods(model):
        raise AdapterError(f"adapter name `{name}`: taken on this model", "detach it first, or choose another name")
    refuse_without_base(model, f"adapter `{name}`")
    if method.in_place and methods(model):
        text = f"adapter `{name}`: it would train the base under {quoted(', '.join(methods(model)))}"
        raise AdapterError(text, "detach or merge what is attached first")
    method = method.planned(model, sample)
    sites = method.sites(model)
    adapters = method.build(model, sites)
    before, were = [(stack, stack.active) for _, _, stack in stacks(model)], trained(model)
    for parameter in model.parameters():  # earlier adapters rest too: the new one is what is trained
        parameter.requires_grad_(method.in_place)
    for site, adapter in zip(sites, adapters, strict=True):
        put(site.module, adapter.to(device(site.module)), name)
    vars(model)["peft_methods"] = {**methods(model), name: method}
    activate(model, [name])
    try:
        method.start(model, name, sample)
    except BaseException:
        take_off(model, name)
        for stack, active in before:
            stack.active = active
        for parameter in were.values():
            parameter.requires_grad_(True)
        raise
    return model


def put(host: nn.Module, adapter: Adapter, name: str) -> None:
    """Add `adapter` to the stack around `host`."""
    vars(adapter)["host"] = host  # a plain reference: registered as a child it would be a cycle
    stack = host._modules.get("adapters")
    if not isinstance(stack, Stack):
        base, stack = host.forward, Stack()
        host.adapters = stack  # a child: moves, shards and saves with its host
        host.forward = update_wrapper(partial(stack, base), base)
    stack[name] = adapter.train(host.training)


def methods(model: nn.Module) -> dict[str, Method]:
    """The methods attached to `model`, by adapter name."""
    return dict(vars(model).get("peft_methods", {}))


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Stack]]:
    """Every adapted module of `model`: its name, itself, the stack around it."""
    for name, module in model.named_modules():
        stack = module._modules.get("adapters")
        if isinstance(stack, Stack):
            yield name, module, stack


def adapters_of(model: nn.Module, name: str | None = None) -> dict[str, Adapter]:
    """The adapters called `name` by the name of their host; of all names, by live name, when None."""
    if name is None:
        return {key: module for key, module in model.named_modules() if isinstance(module, Adapter)}
    return {site: stack[name] for site, _, stack in stacks(model) if name in stack}  # type: ignore[misc]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by live name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def live(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a training step may change, by live name: what is trained, and the buffers of active adapters."""
    resting = {
        inner
        for _, _, stack in stacks(model)
        for name in stack.keys() - {*stack.active}
        for inner in stack[name].modules()
    }
    inside = [(key, one.named_buffers()) for key, one in adapters_of(model).items() if one not in resting]
    buffers = {id(b): (f"{key}.{name}", b) for key, named in reversed(inside) for name, b in named}  # shared ones once
    return {**trained(model), **dict(reversed(buffers.values()))}


def takes(model: nn.Module, keyword: str) -> bool:
    """Whether an active adapter around all of `model`, or of what it wraps for several processes, takes `keyword`."""
    stack = getattr(model, "module", model)._modules.get("adapters")
    adapters = [cast(Adapter, stack[name]) for name in stack.active] if isinstance(stack, Stack) else []
    return any(keyword in adapter.takes for adapter in adapters)


def activate(model: nn.Module, names: Iterable[str] | Mapping[str, float]) -> nn.Module:
    """Make the adapters `names` the active ones, in this order; a mapping gives each a weight.

    A weight other than 1 needs a method with a weight update. Raises AdapterError, with nothing changed, for names
    that are not attached and weights that cannot be used.
    """
    names = [names] if isinstance(names, str) else names
    weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    problems = [problem for name, weight in weights.items() for problem in unusable(model, name, weight)]
    if problems:
        raise AdapterError.of(problems)
    if set(weights) != set(methods(model)):
        refuse_without_base(model, "activate")
    for name, weight in weights.items():
        for adapter in adapters_of(model, name).values():
            adapter.strength = float(weight)
    for _, _, stack in stacks(model):
        stack.active = tuple(name for name in weights if name in stack)
    return model


def unusable(model: nn.Module, name: str, weight: float) -> Iterator[Problem]:
    """Why the adapter `name` cannot be active with `weight`."""
    if name not in methods(model):
        yield unattached(model, name)
    elif isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        yield Problem(f"adapter `{name}`: expected a finite number as its weight; got `{weight}`")
    elif weight != 1:
        for site, adapter in adapters_of(model, name).items():
            if not adapter.scalable:
                what = f"{type(adapter).__name__} at `{site}` has no weight update to multiply"
                yield Problem(f"adapter `{name}`: {what}", "use the weight 1")


def unattached(model: nn.Module, name: str) -> Problem:
    """That no adapter is called `name`, and which there are."""
    have = ", ".join(f"`{n}`" for n in methods(model)) or "none"
    return Problem(f"adapter `{name}`: not attached to this model", f"attached: {have}")


def refuse_without_base(model: nn.Module, place: str) -> None:
    """Raise AdapterError when the base is needed as it was, and a method has trained it in place."""
    for name, method in methods(model).items():
        if method.in_place:
            text = f"{place}: `{name}` has trained the base itself, which is no longer as it was"
            raise AdapterError(text, "load the base a second time; `type: layers` and adapters leave it as it is")


@contextmanager
def acting(model: nn.Module, names: Iterable[str]) -> Iterator[nn.Module]:
    """The adapters `names` alone act inside this context, as they are; afterwards those that acted before."""
    before = [(stack, stack.active, stack.rows) for _, _, stack in stacks(model)]
    wanted = list(names)
    try:
        for stack, _, _ in before:
            stack.active, stack.rows = tuple(name for name in wanted if name in stack), None
        yield model
    finally:
        for stack, active, rows in before:
            stack.active, stack.rows = active, rows


@contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """The base model alone: no adapter acts inside this context. Raises AdapterError when it was trained in place."""
    refuse_without_base(model, "bare")
    with acting(model, ()):
        yield model


def detach(model: nn.Module, name: str = "default") -> nn.Module:
    """Take the adapters called `name` off; a host without adapters gets its own forward back.

    Raises AdapterError when `name` is not attached, when it has trained the base in place, or when somebody has since
    put a forward of theirs around ours.
    """
    if name not in methods(model):
        raise AdapterError.of([unattached(model, name)])
    refuse_without_base(model, "detach")
    return take_off(model, name)


def take_off(model: nn.Module, name: str) -> nn.Module:
    """Take the adapters called `name` off, whatever the base has become. Raises AdapterError for hooks around ours."""
    hint = "take the hook off first: accelerate's `remove_hook_from_submodules`"
    hooked = [
        Problem(f"adapter `{name}`: `{site}` was hooked after it was attached", hint)
        for site, host, stack in stacks(model)
        if name in stack and getattr(host.forward, "func", None) is not stack
    ]
    if hooked:
        raise AdapterError.of(hooked)
    for _, host, stack in list(stacks(model)):
        if name in stack:
            del stack[name]
            stack.active = tuple(active for active in stack.active if active != name)
            if not stack:
                restore(host)
    vars(model)["peft_methods"] = {n: m for n, m in methods(model).items() if n != name}
    return model


def restore(host: nn.Module) -> None:
    """Give a host its own forward back, also one that was patched before us (accelerate's offload hooks)."""
    base = cast("partial[Any]", host.forward).args[0]
    del host.adapters, host.forward
    if host.forward != base:
        host.forward = base
