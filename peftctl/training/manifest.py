"""`manifest.json`: size and SHA-256 of every file of a folder, so that one bit that differs is seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from peftctl.config.quote import quoted, shown
from peftctl.errors import Problem, StorageError
from peftctl.training import filesystem
from peftctl.training.filesystem import Written

FORMAT = 1
NAME = "manifest.json"


def seal(folder: Path, written: Mapping[str, Written]) -> None:
    """Writes the manifest of `folder`, as its last file.

    `written` says by relative name what was put into the files that were written here: hashed from memory, so that
    reading back proves something. All others are hashed as they lie.
    """
    files = {name: written[name] if name in written else _digest(folder / name) for name in _names(folder)}
    manifest = {"format": FORMAT, "files": {name: file._asdict() for name, file in files.items()}}
    filesystem.write(folder / NAME, [json.dumps(manifest, indent=1).encode() + b"\n"])


def verify(folder: Path) -> None:
    """Raises StorageError with every way in which `folder` differs from its manifest."""
    if problems := _differences(folder):
        hint = "it cannot be trusted: use an older one, or make it anew"
        raise StorageError.of([Problem(f"{folder}: {problem}", hint) for problem in problems])


def _differences(folder: Path) -> list[str]:
    try:
        manifest = json.loads((folder / NAME).read_bytes())
        if manifest["format"] != FORMAT:
            return [f"format {shown(str(manifest['format']))}; this version reads {FORMAT}"]
        expected = {name: Written(file["size"], file["sha256"]) for name, file in manifest["files"].items()}
    except FileNotFoundError:
        return [f"`{NAME}` is missing: it was never finished"]
    except OSError as error:
        return [f"`{NAME}` cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"`{NAME}` is damaged"]
    present = set(_names(folder)) - {NAME}
    problems = [f"{quoted(name)} is missing" for name in sorted(expected.keys() - present)]
    problems += [f"{quoted(name)} does not belong to it" for name in sorted(present - expected.keys())]
    for name in sorted(present & expected.keys()):
        try:
            found = _digest(folder / name)
        except StorageError as error:
            problems.append(f"`{name}` cannot be read: {error}")
            continue
        if found.size != expected[name].size:
            problems.append(f"`{name}` has {found.size} bytes; {shown(str(expected[name].size))} were written")
        elif found != expected[name]:
            problems.append(f"`{name}` is not what was written: its SHA-256 differs")
    return problems


def _names(folder: Path) -> list[str]:
    """Everything in `folder` that is no folder, links included, as sorted relative names."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _digest(path: Path) -> Written:
    with filesystem.guarded(path), path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Written(file.tell(), sha256)
