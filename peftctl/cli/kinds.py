"""`peftctl methods` and `peftctl tasks`: what `method.type` and `trainer.task` can be."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftctl.cli import console
from peftctl.cli.words import Json


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One method, with all its fields.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or explain one. Its page has the equation, the paper and the fields."""
    from peftctl.cli.pages import method_page
    from peftctl.verbs.methods import describe

    show(describe(name), method_page, as_json)


def tasks(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One task, with all its fields.")] = None,
    as_json: Json = False,
) -> None:
    """List the tasks, or explain one. Its page has the loss, the paper and the fields."""
    from peftctl.cli.pages import task_page
    from peftctl.verbs.tasks import describe

    show(describe(name), task_page, as_json)


def show(found: Any, page: Any, as_json: bool) -> None:
    """A list of names, or the page of one."""
    from peftctl.cli.pages import listing

    if as_json:
        console.out_json(found)
    elif isinstance(found, list):
        console.out(listing([(one["name"], one["title"]) for one in found], console.columns()))
    else:
        console.out(page(found, console.columns()))
