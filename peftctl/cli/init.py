"""`peftctl init`: asks what it was not told, on a terminal; elsewhere every answer is an option."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from peftctl.cli import console
from peftctl.cli.commands import CommandLineError

QUESTIONS = {
    "model": "base model: a hub id, a folder or a .gguf file",
    "data": "training rows: a file, folder or hub id",
    "task": (
        "task: chat, instruction, text, code, classification, translation, summarisation, preferences or captioning"
    ),
}


def init(
    to: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Hub id, folder or .gguf file.")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Training rows; they are counted if there.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="chat, instruction, text, code, classification, translation, summarisation, preferences or "
            "captioning.",
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="A method; by default what suits the size of the model.")
    ] = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="conservative, balanced or aggressive: how much to train.")
    ] = "balanced",
) -> None:
    """Write a first recipe, every setting with its reason. Asks for what is left out. Prints the file."""
    answers = {"model": model, "data": data, "task": task}
    missing = [name for name, answer in answers.items() if answer is None]
    if missing and not sys.stdin.isatty():
        options = " and ".join(f"`--{name}`" for name in missing)
        raise CommandLineError(f"{options} missing", "on a terminal, what is left out is asked for")
    for name in missing:
        default = "chat" if name == "task" else None
        try:
            answers[name] = typer.prompt(QUESTIONS[name], default=default, err=True)
        except typer.Abort:  # Ctrl-C, or Ctrl-D
            typer.echo(err=True)  # ends the line of the question
            raise KeyboardInterrupt from None

    from peftctl.cli.live import listening
    from peftctl.verbs.init import init as verb

    with listening() as listen:
        path = verb(to, **answers, method=method, preset=preset, listen=listen)  # type: ignore[arg-type]
    console.out(str(path))
