"""Words that several groups of commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write; it must not exist yet.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result, and errors too, as JSON.")]
