"""Words that several groups of commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a bundled recipe.")]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE ...", help="Changes to the recipe, as in `trainer.steps=50`."),
]
Target = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write; it must not exist yet.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result, and errors too, as JSON.")]
