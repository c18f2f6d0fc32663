"""`peftctl eval`: figures of base and adapter, and the exit code of their gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftctl.cli import console
from peftctl.cli.words import Changes, Json
from peftctl.errors import GateFailed

EXAMPLES = """
peftctl eval runs/llama7b-qlora
peftctl eval my.yaml --adapter runs/try/adapter
peftctl eval runs/llama7b-qlora --data other.jsonl --metrics accuracy --labels yes,no
peftctl eval runs/llama7b-qlora --junit gates.xml --markdown summary.md
"""


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or a run folder.")],
    changes: Changes = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="DIR", help="Adapter to measure, instead of the run's.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="Rows to measure on, instead of the recipe's; more than once."),
    ] = None,
    set: Annotated[str | None, typer.Option(metavar="NAME", help="Only these of the recipe's eval sets.")] = None,
    metrics: Annotated[str | None, typer.Option(metavar="A,B", help="Metrics, instead of the recipe's.")] = None,
    labels: Annotated[str | None, typer.Option(metavar="A,B", help="The possible answers.")] = None,
    max_rows: Annotated[int | None, typer.Option(metavar="N", min=1, help="The first rows of each set.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the gates as JUnit XML, for CI.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all tables, for a job summary.")] = None,
    as_json: Json = False,
) -> None:
    """Measure base and adapter side by side. Prints the file with the figures. Exit code 3: a gate failed."""
    from peftctl.cli.live import listening
    from peftctl.verbs.asked import Asked
    from peftctl.verbs.evaluate import evaluate as verb

    asked = Asked(data=tuple(data or ()), metrics=words(metrics), labels=words(labels), set=set, max_rows=max_rows)
    with listening() as listen:
        try:
            result = verb(
                target,
                overrides=changes or [],
                adapter=adapter,
                asked=asked,
                junit_file=junit,
                markdown_file=markdown,
                listen=listen,
            )
        except GateFailed as error:
            failed, result = error.problems, error.result
        else:
            failed = ()
    console.hand_over(result, as_json)
    if failed:
        console.complain(failed)
        raise typer.Exit(GateFailed.exit_code)


def words(text: str | None) -> tuple[str, ...]:
    """A list that is written with commas."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())
