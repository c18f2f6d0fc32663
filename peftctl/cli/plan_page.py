"""The page of `peftctl plan`, and that of `peftctl bench`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.cli.pace import duration, quantity
from peftctl.cli.pages import listing

PARTS = {
    "weights": "weights of the base",
    "quantisation": "scales of quantised weights",
    "adapters": "adapters",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations",
    "logits": "output head and loss",
    "workspace": "passing tensors",
    "libraries": "Python, torch and the rest",
    "slack": "holes of the allocator",
}
BAR = 30
"""Columns of the longest bar."""


def page(found: Mapping[str, Any], columns: int | None) -> str:
    """What a run needs."""
    blocks = [listing(facts(found), columns), memory(found)]
    if "fit" in found:
        blocks.append(fitting(found))
    return "\n\n".join(blocks)


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labels and values."""
    count, data, flops = found["parameters"], found["data"], found["flops"]
    quantised = "" if found["quantization"] == "none" else f", weights in {found['quantization']}"
    share = f"{count['trained']:,} of {count['total']:,} parameters train ({count['trained'] / count['total']:.2%})"
    rows = [
        ("model", f"{found['model']}, {found['dtype']} on {found['device']}{quantised}"),
        ("method", f"{found['method']}: {share}, {gib(found['adapter_bytes'])} on disk"),
        ("data", told(data)),
        ("work", f"{engineering(flops['per_token'])}FLOP a token" + total(flops["total"])),
    ]
    if found["seconds"]["total"] is not None:
        rows.append(("time", f"about {duration(found['seconds']['total'])}, by how fast this machine multiplies"))
    return rows


def total(flops: int | None) -> str:
    """The work of the whole run, where it is known how long that is."""
    return "" if flops is None else f", {engineering(flops)}FLOP in all"


def told(data: Mapping[str, Any]) -> str:
    """How much there is to train on."""
    parts = [] if data["rows"] is None else [f"{data['rows']:,} rows, {data['tokens']:,} tokens"]
    parts += [] if data["steps"] is None else [f"{data['steps']:,} steps of {data['positions_per_step']:,} positions"]
    parts += [data["note"]] if data["note"] else []
    return ", ".join(parts)


def memory(found: Mapping[str, Any]) -> str:
    """Every component with a bar, and the sum."""
    held = {name: found["memory"][key] for key, name in PARTS.items() if found["memory"][key] >= 2**19}
    most, wide = max(held.values()), max(map(len, held))
    lines = [
        f"  {name.ljust(wide)}  {size / 2**30:8.2f}  {'█' * max(1, round(BAR * size / most))}"
        for name, size in held.items()
    ]
    peaks = ", ".join(f"{name} {gib(found[key])}" for key, name in PEAKS.items())
    whole = f"  {'at most'.ljust(wide)}  {found['memory']['total'] / 2**30:8.2f}"
    return "\n".join(["memory [GiB]", *lines, whole, f"  at other times: {peaks}"])


PEAKS = {"load_peak": "loading", "save_peak": "saving", "merge_peak": "merging"}


def fitting(found: Mapping[str, Any]) -> str:
    """The changes that make it fit, each with what is then held."""
    fit = found["fit"]
    wanted = gib(fit["bytes"])
    if not fit["changes"]:
        text = f"fits {wanted}, with {gib(fit['bytes'] - found['peak'])} to spare" if fit["fits"] else ""
        return text or f"does not fit {wanted}, and no change here makes it smaller"
    wide = max(len(change["set"]) for change in fit["changes"])
    lines = [f"  {change['set'].ljust(wide)}  {change['peak'] / 2**30:8.2f}" for change in fit["changes"]]
    head = f"to fit {wanted}, one after the other; each step learns from as many rows as before [GiB]"
    if not fit["fits"]:
        head = f"does not fit {wanted} with all of these [GiB]"
    return "\n".join([head, *lines])


def bench_page(found: Mapping[str, Any], columns: int | None) -> str:
    """What a few steps took."""
    step = found["step_seconds"]
    rows = [
        ("speed", f"{quantity(found['tokens_per_second'])} tokens/s"),
        ("step", f"{step['median']:.2f} s, from {step['least']:.2f} to {step['most']:.2f} over {found['steps']} steps"),
        ("memory", against(found["peak_memory"], found["predicted_memory"])),
    ]
    return listing(rows, columns)


def against(measured: int, predicted: int | None) -> str:
    """`2.31 GiB at most, 2.40 predicted (+4 %)`."""
    text = f"{gib(measured)} at most"
    if predicted is None:
        return text
    return f"{text}, {predicted / 2**30:.2f} predicted ({100 * (predicted / measured - 1):+.0f} %)"


def gib(size: float) -> str:
    """`2.31 GiB`, `9.3 MiB`."""
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**29 else f"{size / 2**20:.1f} MiB"


def engineering(value: float) -> str:
    """`28.5 G`, `1.2 P`."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5 or unit == "E":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
