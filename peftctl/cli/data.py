"""`peftctl data`: the page people open first when training goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from peftctl.cli import console
from peftctl.cli.words import Changes, Json, Recipe
from peftctl.errors import DataError, Problem


def data(
    recipe: Recipe,
    changes: Changes = None,
    rows: Annotated[int, typer.Option(metavar="N", min=0, help="Rows to show, token by token.")] = 4,
    set: Annotated[
        str, typer.Option(metavar="NAME", help="train, eval, or the name of a set of evaluation rows.")
    ] = "train",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the page as HTML too, with all tokens of these rows.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what the model will see, what is trained, and what is wrong. Exit code 1: a check failed."""
    from peftctl.cli.data_page import page
    from peftctl.cli.live import listening
    from peftctl.cli.screen import screen
    from peftctl.recipe import read
    from peftctl.verbs.data import data as verb

    with listening() as listen:
        found = verb(read(recipe, changes or []), rows=rows, set=set, listen=listen)
        if html is not None:
            from peftctl.cli.data_html import document
            from peftctl.training.storage import replace_atomically

            replace_atomically(html, document(found).encode("utf-8", "backslashreplace"))
            listen({"event": "note", "text": f"written: {html}"})
    if as_json:
        console.out_json(found)
    else:
        on = screen(sys.stdout)
        console.out_page(page(found, on), on)
    if not found["ok"]:
        failed = dict.fromkeys(check["name"] for check in found["checks"] if check["state"] == "failed")
        console.complain([Problem(f"`{found['set']}`: checks failed: {', '.join(failed)}")])
        raise typer.Exit(DataError.exit_code)
