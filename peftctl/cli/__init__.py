"""The command line: thin, and nothing heavy is imported before a command needs it."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from types import FrameType

from peftctl.cli import console
from peftctl.errors import PeftctlError, Problem

OFFLINE = "--offline"
INTERRUPTED = 130
UNREAD = 141
"""What a shell reports for a program whose reader left: 128 and SIGPIPE."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line, by default that of this process, and return its exit code. Raises nothing but bugs."""
    words = set_network(sys.argv[1:] if words is None else list(words))
    console.prepare()
    try:
        return answer(words)
    except console.Unread:
        return UNREAD
    finally:
        console.settle()
        gc.freeze()  # the process ends: to look once more through all that torch made takes a third of a second


def set_network(words: list[str]) -> list[str]:
    """`words` without `--offline`, which is the same as HF_HUB_OFFLINE=1; nothing reports what is done here, ever.

    It goes before a command or behind it. The libraries look at the environment when they are imported, which is why
    it is looked for before anything else.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    mine = list(takewhile(lambda word: word != "--", words))
    if OFFLINE not in mine:
        return words
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:  # in a process that has it already
        vars(constants)["HF_HUB_OFFLINE"] = True
    return [word for word in mine if word != OFFLINE] + words[len(mine) :]


def answer(words: list[str]) -> int:
    """The exit code, after everything that a user can mend is told."""
    as_json = "--json" in takewhile(lambda word: word != "--", words)

    def tell() -> None:
        console.complain([Problem("interrupted")], as_json=as_json)

    try:
        from peftctl.cli.app import run

        with imports_left_whole(tell):
            return run(words)
    except PeftctlError as error:
        console.complain(error.problems, as_json=as_json)
        return error.exit_code
    except KeyboardInterrupt:
        tell()
        return INTERRUPTED


@contextmanager
def imports_left_whole(tell: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C in the middle of an import ends the process at once, after `tell`.

    Raised there, KeyboardInterrupt may be swallowed by the library that is loading, and what is half loaded fails later
    in its own ways: torch goes on without numpy, and numpy recurses.
    """

    def interrupted(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                tell()
                os._exit(INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # somebody wants it otherwise
        yield
        return
    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
