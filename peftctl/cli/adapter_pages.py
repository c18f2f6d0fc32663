"""What `adapters inspect` and `adapters diff` show to a person."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from peftctl.cli.layout import table
from peftctl.cli.pages import listing

WIDE = 200
"""Columns of a table that goes to no terminal."""


def inspection(found: Mapping[str, Any], columns: int | None) -> str:
    """Facts, and of a LoRA a row for each kind of module."""
    facts = [
        ("adapter", found["path"]),
        ("method", f"{found['method']} (PEFT: {found['peft_type']})"),
        ("base", str(found["base"])),
        ("parameters", f"{found['parameters']:,}"),
        ("size", f"{found['bytes'] / 2**20:.1f} MiB, {', '.join(found['dtype'])}"),
    ]
    if found["sites"]["count"]:
        facts.append(("modules", f"{found['sites']['count']}: {counted(found['sites']['by_name'])}"))
    facts += [(name, str(value)) for name, value in found["settings"].items()]
    if "updates" not in found:
        return listing(facts, columns)
    rank = found["rank"]
    spread = f"{rank['min']} to {rank['max']}, {rank['mean']:.1f} on average"
    facts.append(("rank", spread if rank["min"] < rank["max"] else str(rank["max"])))
    facts.append(("norm of the update", f"{found['norm']:.4g}"))
    rows = [
        [name, str(len(group)), mean(group, "rank"), mean(group, "norm"), mean(group, "effective_rank")]
        for name, group in kinds(found["updates"])
    ]
    heads = ["module", "count", "rank", "norm", "effective rank"]
    return f"{listing(facts, columns)}\n\n{drawn(heads, rows, columns)}\n\nmeans; `--json` has every module"


def comparison(found: Mapping[str, Any], columns: int | None) -> str:
    """What differs, and a row for each kind of module."""
    first, second = found["base"]["names"]
    overall = found["overall"]
    facts = [
        ("base", str(first) if found["base"]["same"] else f"{first}, {second}"),
        ("distance", figure(overall["distance"])),
        ("cosine", figure(overall["cosine"])),
    ]
    facts += [(name, f"{ours}, {theirs}") for name, (ours, theirs) in found["settings"].items()]
    sides = {"only_in_first": found["path"], "only_in_second": found["other"]}
    facts += [(f"only in {place}", ", ".join(found[side])) for side, place in sides.items() if found[side]]
    if found["others_differ"]:
        facts.append(("trained whole, and different", ", ".join(found["others_differ"])))
    rows = [
        [name, str(len(group)), mean(group, "distance"), mean(group, "cosine")] for name, group in kinds(found["sites"])
    ]
    heads = ["module", "count", "distance", "cosine"]
    return f"{listing(facts, columns)}\n\n{drawn(heads, rows, columns)}\n\nmeans; `--json` has every module"


def kinds(sites: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The sites by the last part of their name."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for site in sites:
        groups.setdefault(site["site"].rpartition(".")[2], []).append(site)
    return sorted(groups.items())


def mean(group: Sequence[Mapping[str, Any]], key: str) -> str:
    """The mean of a figure over the sites that have it."""
    have = [site[key] for site in group if site[key] is not None]
    return figure(sum(have) / len(have) if have else None)


def figure(value: float | None) -> str:
    """A number as it is read, or the place of one."""
    return "-" if value is None else f"{value:.4g}"


def counted(by_name: Mapping[str, int]) -> str:
    """`2 q_proj, 2 v_proj`."""
    return ", ".join(f"{count} {name}" for name, count in by_name.items())


def drawn(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> str:
    """A table as text."""
    page = io.StringIO()
    Console(file=page, width=width or WIDE, color_system=None).print(table(columns, rows))
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())
