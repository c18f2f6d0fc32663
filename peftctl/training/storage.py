"""Whole or not at all: folders and small files that are complete and durable, or were never there.

A folder is built as a temporary sibling, made durable, checked and renamed. Whoever dies on the way leaves
`.tmp-NAME-PID`, `.old-NAME-PID` or `.trash-NAME-PID` behind, which `sweep` clears.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peftctl.errors import StorageError
from peftctl.training.filesystem import guarded, make_folder, new_folder, remove, rename, sync, sync_tree, write

_LEFTOVER = re.compile(r"\.(?P<kind>tmp|old|trash)-(?P<name>.+)-(?P<pid>\d+)")


def replace_atomically(path: Path, data: bytes) -> None:
    """Gives the small file `path` new content: a reader, and a loss of power, see the old or the new, never a part."""
    temporary = _beside(path, "tmp")
    remove(temporary)
    try:
        write(temporary, [data])
        sync(temporary)
        rename(temporary, path)
    except BaseException:
        with suppress(StorageError):
            remove(temporary)
        raise
    sync(path.parent)


@contextmanager
def staged(final: Path, *, replace: bool = False, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Builds the folder `final` whole or not at all.

    Gives a temporary sibling to write into. At the end everything in it is made durable, `check(folder)` may still
    refuse it by raising, and it is renamed to `final`. Any exception removes it and leaves `final` as it was.

    Raises StorageError when the disk refuses, and when `final` exists (an empty folder aside) without `replace`.
    With `replace` the old one is deleted after the new one is durable.
    """
    if not replace and _occupied(final):
        raise StorageError(f"{final}: exists already", "choose another place, or remove it first")
    make_folder(final.parent)
    sweep(final.parent, final.name)
    folder = _beside(final, "tmp")
    new_folder(folder)
    try:
        try:
            yield folder
        except OSError as error:  # from whatever the caller writes with
            with guarded(Path(str(error.filename or final))):
                raise
        sync_tree(folder)
        if check is not None:
            check(folder)
        _move_in(folder, final, replace)
    except BaseException:
        with suppress(StorageError):
            remove(folder)
        raise


def sweep(parent: Path, name: str | None = None) -> list[Path]:
    """Clears what dead processes left in `parent`, for `name` alone where given; returns what was there.

    A folder that was only moved aside (its successor never arrived) goes back to its place. An entry with our own
    process id is a dead namesake's: in a container every run may have the same.
    """
    with guarded(parent):
        entries = sorted(parent.iterdir()) if parent.is_dir() else []
    found = []
    for path in entries:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or (name is not None and match["name"] != name) or _runs(int(match["pid"])):
            continue
        found.append(path)
        if match["kind"] == "old" and not os.path.lexists(parent / match["name"]):
            rename(path, parent / match["name"])
            sync(parent)
        else:
            remove(path)
    return found


def discard(path: Path) -> None:
    """Deletes a folder so that a half-deleted one is never taken for a whole one: renamed first, then removed."""
    trash = _beside(path, "trash")
    remove(trash)
    rename(path, trash)
    sync(path.parent)
    remove(trash)


def _move_in(folder: Path, final: Path, replace: bool) -> None:
    """Renames `folder` to `final`; what was there is kept aside until the new name is durable."""
    old = _beside(final, "old")
    aside = replace and _occupied(final)
    if aside:
        rename(final, old)
    try:
        rename(folder, final)
    except BaseException:
        if aside and not os.path.lexists(final):
            with suppress(StorageError):
                rename(old, final)
        raise
    sync(final.parent)
    if aside:
        remove(old)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{kind}-{path.name}-{os.getpid()}")


def _occupied(path: Path) -> bool:
    with guarded(path):
        return path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir())))


def _runs(pid: int) -> bool:
    """Whether another process with this id is alive."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's, but alive
        pass
    return True
