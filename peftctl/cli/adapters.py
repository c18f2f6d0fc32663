"""`peftctl adapters`: what can be done with adapter folders alone."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from peftctl.cli import console
from peftctl.cli.commands import Command, CommandLineError, Group
from peftctl.cli.words import Json, Target

adapters = typer.Typer(cls=Group, rich_markup_mode=None)

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter folder, a run folder, or a hub id.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of what is drawn.")]


@adapters.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Look into adapters, compare, combine, resize or convert them."""
    if context.invoked_subcommand is None:
        console.page(context.get_help())
        raise typer.Exit(CommandLineError.exit_code)


@adapters.command(cls=Command, epilog="peftctl adapters inspect runs/smollm2-lora")
def inspect(adapter: Adapter, as_json: Json = False) -> None:
    """Show what is in an adapter. Of a LoRA: how large each update is, and how many ranks it really uses."""
    from peftctl.cli.adapter_pages import inspection
    from peftctl.cli.live import listening
    from peftctl.verbs.adapters import inspect as verb

    with listening() as listen:
        found = verb(adapter, listen=listen)
    if as_json:
        console.out_json(found)
    else:
        console.out(inspection(found, console.columns()))


@adapters.command(cls=Command, epilog="peftctl adapters diff runs/a runs/b")
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A LoRA: an adapter or run folder, or a hub id.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another of the same base.")],
    as_json: Json = False,
) -> None:
    """Compare two LoRAs. Distance ||A - B|| / ||A|| and cosine of their updates, and settings that differ."""
    from peftctl.cli.adapter_pages import comparison
    from peftctl.cli.live import listening
    from peftctl.verbs.adapters import diff as verb

    with listening() as listen:
        found = verb(first, second, listen=listen)
    if as_json:
        console.out_json(found)
    else:
        console.out(comparison(found, console.columns()))


@adapters.command(
    cls=Command,
    epilog="""
    peftctl adapters combine runs/a runs/b --weights 0.7,0.3 --output both
    peftctl adapters combine runs/a runs/b --how ties --density 0.2 --r 32 --output both
    """,
)
def combine(
    targets: Annotated[list[str], typer.Argument(metavar="ADAPTER ...", help="LoRAs of one base.")],
    output: Target,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="A weight for each adapter; by default equal, of sum 1.")
    ] = None,
    how: Annotated[
        Literal["linear", "cat", "svd", "ties", "dare"],
        typer.Option(
            metavar="linear|cat|svd|ties|dare",
            help="linear: the weighted sum, exactly; cat: the same, factors side by side; svd: its best approximation "
            "of rank --r; ties, dare: sparse updates, then as svd.",
        ),
    ] = "linear",
    r: Annotated[
        int | None,
        typer.Option("--r", metavar="N", min=1, help="Rank, for svd, ties and dare; by default the highest."),
    ] = None,
    density: Annotated[
        float, typer.Option(metavar="SHARE", help="With ties and dare: share of the entries that stay.")
    ] = 0.5,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make one LoRA of several. Prints its folder."""
    from peftctl.cli.live import listening
    from peftctl.verbs.adapters import combine as verb

    numbers = None if weights is None else [number(part) for part in weights.split(",")]
    with listening() as listen:
        result = verb(targets, output, weights=numbers, how=how, r=r, density=density, seed=seed, listen=listen)
    console.hand_over(result, as_json)


@adapters.command(cls=Command, epilog="peftctl adapters resize runs/a --r 8 --output a-r8")
def resize(
    adapter: Adapter,
    r: Annotated[int, typer.Option("--r", metavar="N", min=1, help="Rank at every site.")],
    output: Target,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Change the rank of a LoRA. More ranks change nothing until they are trained; fewer keep what they can. Prints
    its folder."""
    from peftctl.cli.live import listening
    from peftctl.verbs.adapters import resize as verb

    with listening() as listen:
        result = verb(adapter, output, r=r, seed=seed, listen=listen)
    console.hand_over(result, as_json)


@adapters.command(cls=Command, epilog="peftctl adapters convert runs/dora --to lora --r 16 --output as-lora")
def convert(
    adapter: Adapter,
    to: Annotated[Literal["lora"], typer.Option("--to", metavar="lora", help="What to make of it.")],
    r: Annotated[int, typer.Option("--r", metavar="N", min=1, help="Rank at every site.")],
    output: Target,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Base model, when the adapter does not name the right one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a LoRA of an adapter of another method. Its weights are read one at a time. Prints its folder."""
    from peftctl.cli.live import listening
    from peftctl.verbs.adapters import convert as verb

    with listening() as listen:
        result = verb(adapter, output, r=r, base=base, listen=listen)
    console.hand_over(result, as_json)


def number(word: str) -> float:
    """A finite number of the command line. Raises CommandLineError."""
    import math

    try:
        found = float(word)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise CommandLineError(f"`--weights`: `{word}` is not a number", "as in `--weights 0.7,0.3`")
    return found
