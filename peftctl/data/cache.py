"""Prepared rows are kept by what they were made of, so that they are never used for anything else.

The key of an entry hashes the bytes of the files, the settings, the tokenizer, the chat template and the code that
prepares. An entry is written beside its place and renamed, with the hashes of its own files, which are checked before
it is used. Entries that nobody used for a month are removed. Not kept are rows of hub data sets, and rows whose chat
template writes the date.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftctl.config.home import cache_home
from peftctl.data.dataset import Dataset, Source, Sources
from peftctl.data.reading import Reading
from peftctl.data.sources import files, listed
from peftctl.errors import DataError, StorageError

MANIFEST = "manifest.json"
UNUSED = 30 * 24 * 3600
"""Seconds after which an entry that nobody used is removed."""

OFF = "PEFTCTL_NO_CACHE"
"""Environment variable that turns the cache off."""

LIBRARIES = ("transformers", "tokenizers", "jinja2")
HINT = "see to free space, or set PEFTCTL_HOME and TMPDIR to folders that have it"


def home() -> Path:
    """The folder of all entries."""
    return cache_home() / "data"


def key(spec: Sources, dataset: Dataset, tokenizer: Any, root: Path, reading: Reading) -> str | None:
    """The name of what `spec` makes; None where it is not to be kept, or a file is not there."""
    if os.environ.get(OFF):
        return None
    try:
        sources = [[asdict(source), contents(source, root)] for source in listed(spec)]
    except DataError:  # reading tells what is wrong with all of them
        return None
    if any(found is None for _, found in sources):
        return None
    settings = {name: value for name, value in asdict(dataset).items() if name not in ("train", "eval")}
    template = root / dataset.chat_template
    own = template.read_text("utf-8", "replace") if template.is_file() else tokenizer.chat_template
    if "strftime_now" in str(own):
        return None
    versions = [version(name) for name in LIBRARIES]
    made_of = [reading.name, settings, sources, own, of_tokenizer(tokenizer), of_code(), versions]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def contents(source: Source, root: Path) -> list[tuple[str, str]] | None:
    """Name and hash of every file of a source; None for a hub data set."""
    found = files(source.path, root)
    return None if found is None else [(name, of_file(path, name)) for path, name in found]


def of_file(path: Path, name: str) -> str:
    """SHA-256 of the bytes of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {(error.strerror or str(error)).lower()}") from None


def of_tokenizer(tokenizer: Any) -> list[Any]:
    """All that decides which ids a text becomes."""
    whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    added = {id: repr(token) for id, token in tokenizer.added_tokens_decoder.items()}
    return [type(tokenizer).__name__, whole, added, tokenizer.special_tokens_map, tokenizer.chat_template]


@lru_cache(maxsize=1)
def of_code() -> str:
    """Of every file of this room and of the tasks: what they prepare may change with any of them."""
    sha = hashlib.sha256()
    package = Path(__file__).parents[1]
    found = [path for room in ("data", "tasks") for path in (package / room).rglob("*")]
    for file in sorted(path for path in found if path.suffix in (".py", ".jinja")):
        sha.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return sha.hexdigest()


def find(key: str, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The folder of an entry and what it says of itself; None when there is none, or it is damaged."""
    folder = home() / key[:32]
    if not folder.is_dir():
        return None
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        whole = manifest["key"] == key and manifest["files"] == hashes(folder)
    except (OSError, ValueError, KeyError, TypeError, DataError):
        whole = False
    if not whole:
        say(f"prepared rows in `{folder}` are damaged: preparing them again")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    with suppress(OSError):
        os.utime(folder)
    return folder, manifest


def hashes(folder: Path) -> dict[str, str]:
    """Of every file of an entry but its manifest."""
    return {file.name: of_file(file, file.name) for file in sorted(folder.iterdir()) if file.name != MANIFEST}


def writable(say: Callable[[str], None]) -> bool:
    """Whether entries can be written; says why not."""
    try:
        home().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"prepared rows are not kept: {home()}: {(error.strerror or str(error)).lower()}")
        return False
    if not os.access(home(), os.W_OK | os.X_OK):
        say(f"prepared rows are not kept: {home()}: permission denied")
        return False
    return True


@contextmanager
def workspace(to_keep: bool) -> Iterator[Path]:
    """A folder to prepare in, gone afterwards unless it was kept; among the entries or, if not `to_keep`, elsewhere.

    Raises StorageError when the disk refuses.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".making-", dir=home() if to_keep else None))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        place = error.filename or tempfile.gettempdir()
        raise StorageError(f"{place}: {(error.strerror or str(error)).lower()}", HINT) from error


def keep(folder: Path, key: str, manifest: dict[str, Any]) -> None:
    """Make a workspace the entry of `key`; where another process was faster, its entry stays."""
    manifest = {"key": key, "files": hashes(folder), **manifest}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with suppress(OSError):  # of two processes the second finds a folder in its way
        folder.rename(home() / key[:32])
    sweep()


def sweep() -> None:
    """Remove entries that nobody used for long, and what killed processes left."""
    for folder in home().iterdir():
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > UNUSED:
                shutil.rmtree(folder, ignore_errors=True)
