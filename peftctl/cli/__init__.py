"""The command line: thin, and nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peftctl.cli import console
from peftctl.errors import PeftctlError

INTERRUPTED = 130
UNREAD = 141
"""What a shell reports for a program whose reader left: 128 and SIGPIPE."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line, by default that of this process, and return its exit code. Raises nothing but bugs."""
    words = sys.argv[1:] if words is None else list(words)
    console.prepare()
    try:
        return answer(words)
    except KeyboardInterrupt:
        console.tell("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        if not console.unread():
            raise
        return UNREAD
    finally:
        console.settle()


def answer(words: list[str]) -> int:
    """The same, where the errors that a user can mend are already told."""
    try:
        from peftctl.cli.app import run

        return run(words)
    except PeftctlError as error:
        console.complain(error.problems, as_json="--json" in words)
        return error.exit_code
