"""What a target is: a reader of peftctl, and what it is fed. What it refuses, it refuses in texts that can be shown."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.mutations import Case, Mutator

from peftctl.cli.console import OBEYED
from peftctl.errors import PeftctlError


@dataclass(frozen=True)
class Target:
    """One reader, and what it is fed."""

    mutator: Mutator
    check: Callable[[Case], None]
    """Reads a case as peftctl does; returns when it is taken."""
    seconds: float = 1.0
    """CPU time of a case above which it hangs."""


def lay(folder: Path, case: Case) -> None:
    """The files of a case in `folder`, and of the case before only those that it has too."""
    for name in set(os.listdir(folder)) - case.keys():
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, data in case.items():
        if "/" in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as file:
            file.write(data)


def told(error: PeftctlError, most: int = 4_000) -> None:
    """That an error can be shown: texts that any program can write, of a length that somebody reads."""
    problems: Sequence[Any] = error.problems
    assert problems, "an error without a text"
    for text, hint in problems:
        whole = text if hint is None else f"{text}; {hint}"
        assert text.strip(), "an error without a text"
        assert len(whole) <= most, f"a text of {len(whole)} characters: {whole[:200]!r}"
        assert whole.replace("\n", "").isprintable() or OBEYED.search(whole) is None, f"not printable: {whole[:300]!r}"
        whole.encode()
