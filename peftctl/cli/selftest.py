"""`peftctl selftest`: kills, and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftctl.cli import console
from peftctl.cli.pace import duration
from peftctl.cli.words import Json

EXAMPLES = """
peftctl selftest
peftctl selftest --kills 1000 --folder /scratch
"""


def selftest(
    kills: Annotated[int, typer.Option("--kills", metavar="N", min=1, help="How often the run is killed.")] = 100,
    folder: Annotated[Path, typer.Option("--folder", metavar="DIR", help="Where: on the disk to be tested.")] = Path(),
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="Seed of the moments; another one each time.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Kill a small run again and again on this disk, and count what was lost. It goes on each time; nothing is left."""
    from peftctl.cli.live import listening
    from peftctl.cli.pages import listing
    from peftctl.verbs.selftest import selftest as verb

    with listening() as listen:
        found = verb(kills, folder=folder, seed=seed, listen=listen)
    if as_json:
        console.out_json(found)
    else:
        console.out(listing(facts(found), console.columns()))


def facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Labels and values."""
    return [
        ("disk", found["path"]),
        ("kills", f"{found['kills']} at random moments, in {duration(found['seconds'])}"),
        ("checkpoints", f"{found['lost']} lost, {found['damaged']} damaged"),
        ("adapters", f"{found['exact']} of {found['runs']} bit for bit as without kills"),
        ("work lost", f"{found['most_steps_lost']} steps at most; saved every {found['save_every']}"),
        ("seed", str(found["seed"])),
    ]
