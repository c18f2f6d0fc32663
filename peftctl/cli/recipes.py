"""`peftctl recipes`: what comes along to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftctl.cli import console
from peftctl.cli.commands import Command, Group

recipes = typer.Typer(cls=Group, rich_markup_mode=None)
Bundled = Annotated[str, typer.Argument(metavar="NAME", help="A bundled recipe; `peftctl recipes` lists them.")]


@recipes.callback(invoke_without_command=True)
def listed(context: typer.Context) -> None:
    """List the bundled recipes, show one, or copy one to start from."""
    from peftctl import bundled
    from peftctl.cli.pages import listing

    if context.invoked_subcommand is None:
        console.out(listing(bundled.describe(), console.columns()))


@recipes.command(cls=Command)
def show(name: Bundled) -> None:
    """Print a bundled recipe."""
    from peftctl import bundled

    console.out(bundled.text(name).rstrip("\n"))


@recipes.command(cls=Command, epilog="peftctl recipes copy llama7b-qlora --to my.yaml")
def copy(
    name: Bundled,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="File to write; by default the recipe's name, here.")
    ] = None,
) -> None:
    """Copy a bundled recipe, with its data, to start your own. Prints the file."""
    from peftctl import bundled
    from peftctl.training.filesystem import guarded

    target = to or Path(bundled.path(name).name)
    with guarded(target):
        bundled.copy(name, target)
    console.out(str(target))
