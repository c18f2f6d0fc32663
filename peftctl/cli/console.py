"""The only module that prints. Standard output is data; standard error is what a person reads.

Names of files and words of data are shown, never obeyed: what a terminal would act on becomes a visible escape.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from peftctl.errors import Problem, StorageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but line break and tab, marks that turn the direction of writing, and bytes that are no text."""


MOST = 200
"""Mistakes that are told to a person; a stranger's file can have any number of them."""


class Unread(Exception):
    """The reader of standard output left: there is nobody to tell, and nothing to tell."""


def clean(text: str) -> str:
    """`text` with what a terminal would obey as escapes; line breaks and tabs stay."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """`text`, clean and on one line."""
    return clean(text).replace("\n", "\\n").replace("\t", "\\t")


# Standard output


def out(text: str) -> None:
    """Data, on standard output: as it is for a program, clean for a terminal, escaped where the encoding lacks it.

    Raises Unread when its reader left, StorageError when the disk behind it refuses.
    """
    _write(clean(text) if sys.stdout.isatty() else text)


def out_page(lines: Iterable[Text], on: Console) -> None:
    """A page for a person, on standard output, which `on` stands for: in colour on a terminal.

    Raises Unread and StorageError, as `out` does.
    """
    with on.capture() as page:
        for line in lines:
            on.print(line, soft_wrap=True)
    _write(page.get().removesuffix("\n"))


def _write(text: str) -> None:
    stream = sys.stdout
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError:
        raise Unread from None
    except OSError as error:
        raise StorageError(f"standard output: {(error.strerror or str(error)).lower()}") from None


def out_json(value: Any) -> None:
    """Data as JSON, in ASCII: the same in every locale, and harmless on a terminal."""
    out(json.dumps(_finite(value), indent=2, allow_nan=False, default=str))


def hand_over(result: dict[str, Any], as_json: bool) -> None:
    """The result of a verb: its path, or all of it. Of several processes of one run only the first speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        out_json(result)
    else:
        out(result["path"])


def columns() -> int | None:
    """Columns of the terminal that standard output goes to, at most 100; None when it goes elsewhere."""
    return min(shutil.get_terminal_size().columns, 100) if sys.stdout.isatty() else None


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


# Standard error


def tell(*lines: Text, on: Console | None = None) -> None:
    """Lines for a person: on a terminal broken between words, elsewhere whole."""
    from peftctl.cli.screen import screen

    console = on or screen()
    for line in lines:
        parts = line.split("\n", allow_blank=True) if console.is_terminal else [line]
        for part in parts:
            console.print(folded(part, console.width) if console.is_terminal else part, soft_wrap=True)


def page(text: str) -> None:
    """A page that was not asked for."""
    from rich.text import Text

    tell(Text(text))


def folded(line: Text, columns: int) -> Text:
    """`line` over as many lines as it needs, the later ones indented. A path stays whole: the terminal breaks it."""
    from rich.cells import cell_len
    from rich.text import Text

    indent = len(line.plain) - len(line.plain.lstrip()) + 2
    breaks, column = [], indent - 2
    for word in re.finditer(r"\S+\s*", line.plain):
        if column + cell_len(word[0].rstrip()) > columns and word.start() >= indent:
            breaks.append(word.start())
            column = indent
        column += cell_len(word[0])
    parts = line.divide(breaks)
    for part in parts:
        part.rstrip()
    return Text("\n" + " " * indent).join(parts)


def show(block: RenderableType, on: Console) -> None:
    """Something for a person that is laid out to the width of the terminal, such as a table."""
    on.print(block)


def complain(problems: Iterable[Problem], *, as_json: bool = False) -> None:
    """Everything that is wrong, each with what to do about it; as JSON on standard output too, for programs."""
    from peftctl.cli.layout import message

    problems = list(problems)
    following = [hint for _, hint in problems[1:]] + [None]
    # a hint that several in a row share is told once, under the last of them
    shown = [(text, None if hint == later else hint) for (text, hint), later in zip(problems, following, strict=True)]
    tell(*(line for text, hint in shown[:MOST] for line in message("error", text, hint)))
    if len(problems) > MOST:
        tell(*message("error", f"... and {len(problems) - MOST} more", None))
    if as_json:
        with suppress(StorageError):  # the complaint may be that nothing can be written there
            out_json({"error": [problem._asdict() for problem in problems]})


# Both


def prepare() -> None:
    """Make the standard streams fit to be written to, whatever the shell left of them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next file opened would take its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file name that is no text goes out as it came


def settle() -> None:
    """Leave nothing that Python would stumble over when it flushes the streams at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
