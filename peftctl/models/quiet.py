"""transformers without its own talk: what there is to say goes through `say`, what went wrong through an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Say = Callable[[str], None]
"""Takes one line of news for the person."""


def silent(line: str) -> None:
    """A `Say` that keeps the news to itself."""


@contextmanager
def quiet() -> Iterator[None]:
    """transformers logs errors only and it and the hub draw no bars inside; their settings are put back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def few(names: Sequence[str]) -> str:
    """The first three of many names."""
    return ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def reason(error: BaseException) -> str:
    """What a library says is wrong: its first sentence, in one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = lines[0]
    for more in lines[1:]:
        if not line.endswith(":"):
            break
        line = f"{line} {more}"
    line = line.rstrip(".")
    if isinstance(error, KeyError):
        line = f"missing key {line}"
    return line if len(line) <= 300 else line[:297] + "..."
