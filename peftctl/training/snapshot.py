"""What a run holds besides its weights: optimizer state by parameter name, random generators, surroundings."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import peftctl
from peftctl.training.tensors import pack, unpack

_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "numpy")


def optimizer_record(optimizer: Any, names: Mapping[Parameter, str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer as JSON and tensors, keyed by parameter name: class, groups and the state of each parameter.

    `optimizer` is one of torch, bitsandbytes or transformers, or accelerate's wrapper of one; `names` covers all its
    parameters. Reads `.state` itself, because `state_dict()` numbers the parameters and may hide or cast values.
    """
    tensors: dict[str, Tensor] = {}
    state = {names[parameter]: pack(entry, tensors, names[parameter]) for parameter, entry in optimizer.state.items()}
    groups = [
        {
            "names": [names[parameter] for parameter in group["params"]],
            "values": pack({key: value for key, value in group.items() if key != "params"}, tensors, f"group-{i}"),
        }
        for i, group in enumerate(optimizer.param_groups)
    ]
    return {"class": _class(optimizer), "groups": groups, "state": state}, tensors


def is_record(record: Any) -> bool:
    """Whether it looks like what `optimizer_record` gives."""
    if not (isinstance(record, dict) and record.keys() == {"class", "groups", "state"}):
        return False
    groups, state = record["groups"], record["state"]
    if not (isinstance(groups, list) and isinstance(state, dict)):
        return False
    return all(
        isinstance(group, dict) and isinstance(group.get("names"), list) and isinstance(group.get("values"), dict)
        for group in groups
    )


def optimizer_mismatch(record: Mapping[str, Any], optimizer: Any, names: Mapping[Parameter, str]) -> list[str]:
    """Why `record` is not of this optimizer; empty when it is."""
    problems = []
    if record["class"] != _class(optimizer):
        problems.append(f"optimizer `{_class(optimizer)}`: the checkpoint holds a `{record['class']}`")
    then = [set(group["names"]) for group in record["groups"]]
    now = [{names[parameter] for parameter in group["params"]} for group in optimizer.param_groups]
    if len(then) != len(now):
        return [*problems, f"optimizer: {len(now)} parameter groups; the checkpoint holds {len(then)}"]
    for i, (old, new) in enumerate(zip(then, now, strict=True)):
        problems += [f"optimizer group {i}: `{name}` is missing in the checkpoint" for name in sorted(new - old)]
        problems += [f"optimizer group {i}: `{name}` is in the checkpoint only" for name in sorted(old - new)]
    return problems


def restore_optimizer(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizer: Any, names: Mapping[Parameter, str]
) -> None:
    """Puts a record back in its exact dtypes (`load_state_dict` casts them to the parameter's).

    Tensors go to their parameter's device; step counts that lay on the CPU stay there, as torch's optimizers want.
    """
    optimizer.state.clear()
    for i, group in enumerate(optimizer.param_groups):
        group.update(unpack(record["groups"][i]["values"], tensors))
        on_device = bool(group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            packed = record["state"].get(names[parameter])
            if packed is not None:
                entry = unpack(packed, tensors)
                optimizer.state[parameter] = _placed(entry, parameter, optimizer, on_device)


def _placed(value: Any, parameter: Tensor, optimizer: Any, on_device: bool) -> Any:
    if isinstance(value, dict):
        return {key: _placed(item, parameter, optimizer, on_device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_placed(item, parameter, optimizer, on_device) for item in value)
    if not isinstance(value, Tensor) or parameter.device.type == "cpu" or (value.dim() == 0 and not on_device):
        return value
    if getattr(optimizer, "is_paged", False) and value.shape == parameter.shape:
        # bitsandbytes keeps large states in memory that the GPU pages; only the optimizer can allocate it.
        paged: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)
        return paged.copy_(value)
    return value.to(parameter.device)


def _class(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # accelerate's wrapper keeps it in `.optimizer`


def rng_state() -> dict[str, Tensor]:
    """The random generators of this process: Python's, numpy's where it is imported, torch's for CPU, CUDA and MPS."""
    _, words, gauss = random.getstate()
    state = {"python": torch.tensor(words, dtype=torch.int64), "torch": torch.get_rng_state()}
    if gauss is not None:
        state["python/gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if numpy := sys.modules.get("numpy"):
        _, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = torch.from_numpy(keys.astype("int64"))
        state["numpy/position"] = torch.tensor([position, has_gauss], dtype=torch.int64)
        state["numpy/gauss"] = torch.tensor(cached, dtype=torch.float64)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state |= {f"cuda/{i}": generator for i, generator in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Sets the random generators to `state`; one that this machine has not is left out."""
    gauss = state["python/gauss"].item() if "python/gauss" in state else None
    random.setstate((3, tuple(state["python"].tolist()), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        position, has_gauss = state["numpy/position"].tolist()
        keys = state["numpy"].numpy().astype("uint32")
        numpy.random.set_state(("MT19937", keys, position, has_gauss, state["numpy/gauss"].item()))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda/{i}" in state:
            torch.cuda.set_rng_state(state[f"cuda/{i}"], i)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def surroundings(device: torch.device) -> dict[str, str]:
    """All that bits depend on besides recipe and data: versions, kind of device, threads, number of processes."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if distributed else 1
    found = {"peftctl": peftctl.__version__} | {name: _version(name) for name in _PACKAGES}
    return found | {"device": _kind(device), "threads": str(torch.get_num_threads()), "processes": str(processes)}


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":  # its vector width decides in which order sums are made
        return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return device.type


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
