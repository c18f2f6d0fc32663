"""Results as Markdown: settings, versions, what ran beside, tables."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.turns import ROOT, Measured, Plan, peak, ratios, speeds, tcmalloc

PACKAGES = ["peftctl", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes"]


@dataclass(frozen=True)
class Load:
    """What the machine had done when this was taken [s of one core, but for `average`]."""

    average: float
    busy: float
    ours: float
    at: float

    @classmethod
    def now(cls) -> Load:
        busy = 0.0
        if (stat := Path("/proc/stat")).is_file():
            user, nice, system, _, _, irq, soft, *steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
            busy = (user + nice + system + irq + soft + sum(steal)) / os.sysconf("SC_CLK_TCK")
        spent = os.times()
        mine = spent.user + spent.system + spent.children_user + spent.children_system
        return cls(os.getloadavg()[0], busy, mine, spent.elapsed)

    def told(self, after: Load) -> str:
        """What ran beside a measurement that began now and ended at `after`."""
        others = (after.busy - self.busy - (after.ours - self.ours)) / max(after.at - self.at, 1e-9)
        return (
            f"load average {self.average:.1f} before it began; other processes kept {max(others, 0):.2f} of "
            f"{os.cpu_count()} cores busy meanwhile (0 is an idle machine)"
        )


def machine(plan: Plan) -> list[str]:
    """Versions and hardware, without names of hosts or paths."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    library = "tcmalloc_minimal" if tcmalloc() else "tcmalloc not found: that environment was skipped"
    return [
        f"{', '.join(versions)}; Python {platform.python_version()}; commit {commit()}.",
        f"CPU: {cpu()}; {os.cpu_count()} cores, {plan.threads} threads; {memory()}; {library}.",
    ]


def commit() -> str:
    """The commit that was measured, and whether files of the package differed from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "peftctl"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + (" with changes" if changed.strip() else "")


def cpu() -> str:
    """The processor's model and the vector instructions that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(flags) or 'no AVX-512'})"


def memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / 2**30:.0f} GiB of memory"


def spread(values: list[float], digits: int = 0) -> str:
    """Median (least to most)."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def table(found: list[Measured], plan: Plan) -> list[str]:
    """Speed, ratio and memory of every arm; the first is ours."""
    ours = found[0]
    lines = [
        "| arm | tokens/s | peftctl is | peak, GiB | by loading | peftctl's peak is | first step after, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        name = one.arm.name + (f" ({settings(one.chosen)})" if one.chosen else "")
        if not one.rounds:
            lines.append(f"| {name} | did not run: {one.error} | | | | | |")
            continue
        ratio = of = ""
        if one is not ours and ours.rounds:
            ratio = f"{spread(ratios(ours, one, plan.warm), 2)} x"
            of = f"{peak(ours) / peak(one):.2f}"
        sizes = f"{peak(one) / 2**30:.2f} | {peak(one, 'loaded') / 2**30:.2f}"
        first = statistics.median(outcome["first"] for outcome in one.rounds)
        lines.append(f"| {name} | {spread(speeds(one, plan.warm))} | {ratio} | {sizes} | {of} | {first:.1f} |")
    return lines


def settings(chosen: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in chosen.items())


def losses(found: list[Measured], truth: list[float]) -> list[str]:
    """The loss of every step of the first round, and its largest difference to `truth`, that of a float32 base."""
    alike = [one for one in found if one.rounds and one.arm.same_rows]
    numbers = " | ".join(str(step + 1) for step in range(len(truth)))
    lines = [f"| loss at step | {numbers} | off by at most |", "|---" * (len(truth) + 2) + "|"]
    if truth:
        lines.append("| float32, rows alone | " + " | ".join(f"{loss:.4f}" for loss in truth) + " | |")
    for one in alike:
        each = one.rounds[0]["losses"]
        far = max((abs(a - b) for a, b in zip(each, truth, strict=False)), default=float("nan"))
        repeated = all(outcome["losses"] == each for outcome in one.rounds)
        note = "" if repeated else " (not the same in every round)"
        lines.append(f"| {one.arm.name} | " + " | ".join(f"{loss:.4f}" for loss in each) + f" | {far:.4f}{note} |")
    return lines


def choices(found: list[Measured]) -> list[str]:
    """What was tried beforehand, a line for each arm that had a choice."""
    lines = []
    for one in found:
        if one.tried:
            each = "; ".join(f"{settings(choice)}: {tokens:.0f}" for choice, tokens in one.tried)
            lines.append(f"- Tried for {one.arm.name}, tokens/s of one short run each: {each}.")
    return lines
