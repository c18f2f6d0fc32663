"""The command line: thin, and nothing heavy is imported before a command needs it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from itertools import takewhile

from peftctl.cli import console
from peftctl.errors import PeftctlError, Problem

INTERRUPTED = 130
UNREAD = 141
"""What a shell reports for a program whose reader left: 128 and SIGPIPE."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line, by default that of this process, and return its exit code. Raises nothing but bugs."""
    words = sys.argv[1:] if words is None else list(words)
    console.prepare()
    try:
        return answer(words)
    except console.Unread:
        return UNREAD
    finally:
        console.settle()
        gc.freeze()  # the process ends: to look once more through all that torch made takes a third of a second


def answer(words: list[str]) -> int:
    """The exit code, after everything that a user can mend is told."""
    as_json = "--json" in takewhile(lambda word: word != "--", words)
    try:
        from peftctl.cli.app import run

        return run(words)
    except PeftctlError as error:
        console.complain(error.problems, as_json=as_json)
        return error.exit_code
    except KeyboardInterrupt:
        console.complain([Problem("interrupted")], as_json=as_json)
        return INTERRUPTED
