"""What a disk may hold after a loss of power, from the record of what was asked of it.

A file has the bytes of its last fsync; of those written since, any part may be there: none, all, cut anywhere, zeros in
place of some. A folder has the names of its last fsync; of the changes since, a file system with a journal has made the
first few, a laxer one any of them. A rename is made whole or not at all. After Pillai et al., "All File Systems Are Not
Created Equal", OSDI 2014.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from faulty_disk import FaultyDisk


@dataclass
class File:
    """Its bytes now, and those that are safe."""

    data: bytes = b""
    safe: bytes = b""

    def after_power_loss(self, draw: Random) -> bytes:
        if self.data == self.safe:
            return self.safe
        length = draw.randrange(len(self.data) + 1)
        tail = b"\0" * (len(self.data) - length)
        return draw.choice(
            [self.safe, b"", self.data, self.data[:length], self.data[:length] + tail, b"\0" * len(self.data)]
        )


Change = tuple[str, str, "File | Folder | None"]
"""A name that goes, one that comes with what is there; either may be empty."""


@dataclass
class Folder:
    """Its names now, those that are safe, and the changes since."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    safe: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def change(self, gone: str, come: str, entry: File | Folder | None) -> None:
        self.names.pop(gone, None)
        if come and entry is not None:
            self.names[come] = entry
        self.changes.append((gone, come, entry))

    def after_power_loss(self, draw: Random) -> dict[str, File | Folder]:
        kept = self.changes[: draw.randrange(len(self.changes) + 1)]
        if draw.random() < 0.5:
            kept = [change for change in self.changes if draw.random() < 0.5]
        found = dict(self.safe)
        for gone, come, entry in kept:
            if gone and come and found.get(gone) is not entry:  # a rename of what never came
                continue
            found.pop(gone, None)
            if come and entry is not None:
                found[come] = entry
        return found


class Recorder(FaultyDisk):
    """An `os` that writes down what is asked of it below `root`; files of others are met when they are synced."""

    def __init__(self, root: Path, forget: int | None = None) -> None:
        super().__init__(forget=forget)
        self.root = root
        self.record: list[tuple[str, tuple[str, ...], bytes | tuple[str, ...]]] = []
        self._known: set[Path] = {root}

    def _parts(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.root).parts

    def _note(self, what: str, path: Path, more: bytes | tuple[str, ...] = b"") -> None:
        self.record.append((what, self._parts(path), more))

    def _meet(self, path: Path) -> None:
        """A file or folder that somebody made without us, at the latest by now."""
        if path in self._known or self.root not in path.parents:
            return
        self._meet(path.parent)
        self._known.add(path)
        if path.is_dir():
            self._note("mkdir", path)
        else:
            self._note("create", path)
            self._note("write", path, path.read_bytes())

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        new = flags & os.O_CREAT and not path.exists()
        file = super().open(path, flags, mode)
        if new:
            self._known.add(path)
            self._note("create", path)
        return file

    def write(self, file: int, data: memoryview) -> int:
        written = super().write(file, data)
        self._note("write", self._paths[file], bytes(data[:written]))
        return written

    def fsync(self, file: int) -> None:
        forgotten = self._syncs == self._forget
        super().fsync(file)
        path = self._paths[file]
        self._meet(path)
        if not forgotten and (path == self.root or self.root in path.parents):
            self._note("fsync", path)

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self._known |= {new / path.relative_to(old) for path in self._known if path == old or old in path.parents}
        self._known -= {path for path in self._known if path == old or old in path.parents}
        self._note("rename", Path(old), self._parts(Path(new)))

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self._known.add(path)
        self._note("mkdir", path)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._known.discard(path)
        self._note("remove", path)

    def rmdir(self, path: Path) -> None:
        super().rmdir(path)
        self._known.discard(path)
        self._note("remove", path)

    def mark(self, name: str) -> None:
        """Something that was promised by now."""
        self.record.append(("mark", (name,), b""))


def states(recorder: Recorder, cases: int, seed: int) -> Iterator[tuple[dict[str, object], list[str]]]:
    """So many trees that a disk may hold after a loss of power, each with the marks that had been made before it."""
    draw = Random(seed)
    moments = sorted(draw.randrange(len(recorder.record) + 1) for _ in range(cases))
    root, marks, done = Folder(), [], 0
    for moment in moments:
        for step in recorder.record[done:moment]:
            if step[0] == "mark":
                marks.append(step[1][0])
            else:
                play(root, *step)
        done = moment
        yield fallen(root, draw), list(marks)


def play(root: Folder, what: str, path: tuple[str, ...], more: bytes | tuple[str, ...]) -> None:
    """One call."""
    if not path:  # a sync of the root
        root.safe, root.changes = dict(root.names), []
        return
    folder, name = at(root, path[:-1]), path[-1]
    entry = folder.names.get(name)
    match what:
        case "create":
            folder.change("", name, File())
        case "mkdir":
            folder.change("", name, Folder())
        case "write":
            assert isinstance(entry, File)
            assert isinstance(more, bytes)
            entry.data += more
        case "fsync" if isinstance(entry, File):
            entry.safe = entry.data
        case "fsync" if isinstance(entry, Folder):
            entry.safe, entry.changes = dict(entry.names), []
        case "rename":
            assert isinstance(more, tuple)
            assert more[:-1] == path[:-1], "a rename from one folder to another would be two changes"
            folder.change(name, more[-1], entry)
        case "remove":
            folder.change(name, "", None)


def at(root: Folder, path: tuple[str, ...]) -> Folder:
    for name in path:
        inner = root.names[name]
        assert isinstance(inner, Folder)
        root = inner
    return root


def fallen(folder: Folder, draw: Random) -> dict[str, object]:
    """The tree that is left: bytes by name, trees by name."""
    left = folder.after_power_loss(draw)
    return {
        name: entry.after_power_loss(draw) if isinstance(entry, File) else fallen(entry, draw)
        for name, entry in left.items()
    }


def write_tree(folder: Path, tree: dict[str, object]) -> None:
    folder.mkdir()
    for name, inner in tree.items():
        if isinstance(inner, dict):
            write_tree(folder / name, inner)
        else:
            assert isinstance(inner, bytes)
            (folder / name).write_bytes(inner)
