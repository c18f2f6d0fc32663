"""`peftctl plan` and `peftctl bench`: what a run needs, before it and on a few of its steps."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from peftctl.cli import console
from peftctl.cli.commands import CommandLineError
from peftctl.cli.words import Changes, Json, Recipe
from peftctl.errors import OutOfMemory

PLAN_EXAMPLES = """
peftctl plan llama7b-qlora model.device=cuda
peftctl plan my.yaml --fit 24GiB
peftctl plan my.yaml trainer.micro_batch_size=8 --json
"""
BENCH_EXAMPLES = """
peftctl bench my.yaml --steps 10
peftctl bench llama7b-qlora model.load_format=dummy
"""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def plan(
    recipe: Recipe,
    changes: Changes = None,
    fit: Annotated[
        str | None, typer.Option("--fit", metavar="SIZE", help="Propose what makes it fit, as in `24GiB` or `80GB`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run needs: parameters, memory, tokens, time. Nothing is loaded. Exit code 4: it cannot be made fit."""
    from peftctl.cli.plan_page import page
    from peftctl.recipe import read
    from peftctl.verbs.plan import plan as verb

    found = verb(read(recipe, changes or []), fit=None if fit is None else size(fit))
    if as_json:
        console.out_json(found)
    else:
        console.out(page(found, console.columns()))
    if fit is not None and not found["fit"]["fits"]:
        raise typer.Exit(OutOfMemory.exit_code)


def bench(
    recipe: Recipe,
    changes: Changes = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=2, help="Steps to train.")] = 6,
    as_json: Json = False,
) -> None:
    """Train a few steps and say how fast they were and what they held. Nothing is kept."""
    from peftctl.cli.live import listening
    from peftctl.cli.plan_page import bench_page
    from peftctl.recipe import read
    from peftctl.verbs.bench import bench as verb

    with listening() as listen:
        found = verb(read(recipe, changes or []), steps=steps, listen=listen)
    if as_json:
        console.out_json(found)
    else:
        console.out(bench_page(found, console.columns()))


def size(text: str) -> int:
    """Bytes of `24GiB`, `24 GB`, `512M`. Raises CommandLineError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip(), re.IGNORECASE)
    if found is None or found[2].upper() not in UNITS:
        raise CommandLineError(f"--fit: expected a size; got `{text}`", "write it as in `24GiB` or `80GB`")
    return round(float(found[1]) * UNITS[found[2].upper()])
