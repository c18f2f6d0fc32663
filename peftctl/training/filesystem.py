"""The file system, one call at a time: every write, sync, rename and removal that must not go wrong unseen.

All file-system calls of a writer go through here, so that tests can fail or kill each of them; what the disk refuses
becomes a StorageError with the reason in words.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from peftctl.errors import StorageError

_ELSEWHERE = "choose another place with `--output`"
_FULL = f"free some space, or {_ELSEWHERE}"
_RIGHTS = f"check the owner and the mode of the folder, or {_ELSEWHERE}"
_TAKEN = "choose another place, or remove it first"

_REASONS: dict[int, tuple[str, str | None]] = {
    errno.ENOSPC: ("no space left on the disk", _FULL),
    errno.EDQUOT: ("the disk quota is used up", _FULL),
    errno.EFBIG: ("larger than a file may be here", f"raise the limit with `ulimit -f`, or {_ELSEWHERE}"),
    errno.EROFS: ("the file system is read-only", _ELSEWHERE),
    errno.EACCES: ("no permission", _RIGHTS),
    errno.EPERM: ("no permission", _RIGHTS),
    errno.EIO: ("the disk failed", "check the disk; what was committed before is as it was"),
    errno.ESTALE: ("the network file system lost it", "mount it again; what was committed before is as it was"),
    errno.EMFILE: ("too many open files", "raise the limit with `ulimit -n`"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("a link, which is not followed", _TAKEN),
    errno.ENOENT: ("does not exist", None),
    errno.ENOTDIR: ("a file is in the way of a folder", _TAKEN),
    errno.EISDIR: ("a folder is in the way of a file", _TAKEN),
    errno.EEXIST: ("exists already", _TAKEN),
    errno.ENOTEMPTY: ("exists already", _TAKEN),
}


class Written(NamedTuple):
    """What a file was given: its length in bytes and its SHA-256, from memory and not read back."""

    size: int
    sha256: str


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turns an `OSError` into a `StorageError` about `path`, with the reason in words and what to do about it."""
    try:
        yield
    except OSError as error:
        words = (error.strerror or type(error).__name__).lower()
        reason, hint = _REASONS.get(error.errno or 0, (words, None))
        raise StorageError(f"{path}: {reason}", hint) from error


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """Creates `path`, which must not exist, and fills it with `chunks`; durable only after `sync`."""
    digest, size = hashlib.sha256(), 0
    with guarded(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            for chunk in chunks:
                digest.update(chunk)
                size += _write_all(file, chunk)
        finally:
            os.close(file)
    return Written(size, digest.hexdigest())


def open_end(path: Path) -> int:
    """A file descriptor that writes to the end of `path`, which is created where it is missing, and may be no link."""
    with guarded(path):
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)


def append(file: int, path: Path, data: bytes) -> None:
    """Adds `data` to the end of the open `file`, all of it or, when the disk refuses, nothing."""
    with guarded(path):
        end = os.fstat(file).st_size
        try:
            _write_all(file, data)
        except BaseException:
            os.ftruncate(file, end)
            raise


def sync(path: Path) -> None:
    """Makes the bytes of a file, or the names in a folder, survive a loss of power."""
    with guarded(path):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems know no sync of a folder
                raise
        finally:
            os.close(file)


def sync_tree(folder: Path) -> None:
    """Syncs all files and folders below `folder`, and `folder` itself."""
    with guarded(folder):
        entries = sorted(folder.iterdir())
    for path in entries:
        if path.is_symlink():  # a link has no bytes of its own; the folder that holds it is synced
            continue
        if path.is_dir():
            sync_tree(path)
        else:
            sync(path)
    sync(folder)


def rename(old: Path, new: Path) -> None:
    """Renames `old` to `new` on the same file system; a file at `new` is replaced, as is an empty folder."""
    with guarded(new):
        os.rename(old, new)


def new_folder(path: Path) -> None:
    """Creates `path`, which must not exist."""
    with guarded(path):
        os.mkdir(path)


def make_folder(path: Path) -> None:
    """Creates `path` and the folders above it where they are missing, durably."""
    with guarded(path):
        if path.is_dir():
            return
    make_folder(path.parent)
    with guarded(path):
        try:
            os.mkdir(path)
        except FileExistsError:
            if not path.is_dir():  # else another process was faster
                raise
    sync(path.parent)


def remove(path: Path) -> None:
    """Deletes a file, a link (not what it points to) or a folder with all that is in it; a missing one is fine."""
    with guarded(path):
        if path.is_symlink() or not path.is_dir():
            with suppress(FileNotFoundError):
                os.unlink(path)
            return
        for inner in sorted(path.iterdir()):
            remove(inner)
        os.rmdir(path)


def _write_all(file: int, chunk: bytes | memoryview) -> int:
    rest = memoryview(chunk).cast("B")
    size = len(rest)
    while rest:  # a disk that fills up may take a part before it refuses
        rest = rest[os.write(file, rest) :]
    return size
