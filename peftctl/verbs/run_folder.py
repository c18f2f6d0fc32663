"""A run folder: all that is needed to repeat a run, and how far it is.

recipe.yaml         the resolved recipe; written first
provenance.json     versions, hashes of data, base and tokenizer, seed, machine
adapter/            the result, in HF PEFT's format; written last, so it is there when the run is finished
checkpoints/        step-000100/ and so on
start/              the adapter that the run started from (`method.init_from`), where it did
metrics.jsonl       one event a line
eval.json           base and adapter side by side
run.lock            held by the one process that writes here
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftctl.errors import RunError, StorageError
from peftctl.models.origin import refuse_other_base
from peftctl.training import filesystem, storage
from peftctl.verbs.provenance import json_bytes

BEFORE = re.compile(r"run\.lock|provenance\.json|\.tmp-(provenance\.json|recipe\.yaml)-\d+")
"""What is written before the recipe, which makes a folder a run."""


class RunFolder:
    """The folder at `path`, which need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.provenance = self.path / "provenance.json"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.start = self.path / "start"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "eval.json"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.recipe.is_file()

    @property
    def empty(self) -> bool:
        """Whether nothing is here, or what somebody left who was killed before the recipe was written."""
        if not self.path.exists():
            return True
        return self.path.is_dir() and all(BEFORE.fullmatch(item.name) for item in self.path.iterdir())

    @property
    def finished(self) -> bool:
        """Whether the run got to its end."""
        return (self.adapter / "adapter_config.json").is_file()

    def read_provenance(self) -> dict[str, Any]:
        """provenance.json; empty when there is none. Raises StorageError when it is damaged."""
        return self.read_json(self.provenance)

    def read_json(self, path: Path) -> dict[str, Any]:
        """A small file of this folder; empty when there is none. Raises StorageError when it is damaged."""
        if not path.is_file():
            return {}
        try:
            with filesystem.guarded(path):
                return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError, RecursionError) as error:
            raise StorageError(f"{path}: damaged: {error}") from None

    def refuse_unwritable(self) -> None:
        """Raise StorageError where nothing could be written, before anything slow begins, or it would go elsewhere."""
        for inner in (self.checkpoints, self.adapter, self.start, self.metrics):
            if inner.is_symlink():
                raise StorageError(f"{inner}: a link, which is not followed", "put the run where there is room instead")
        with filesystem.guarded(self.path):
            nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise StorageError(f"{nearest}: a file is in the way of a folder", "choose another place with `--output`")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise StorageError(f"{nearest}: no permission to write here", "choose another place with `--output`")

    def refuse_other_base(self, base: Path, name: str) -> None:
        """Raise RunError when the model in the folder `base`, called `name`, is not the one this run was trained on."""
        refuse_other_base(self.read_provenance().get("base", {}), base, name, self.path)

    def write_json(self, path: Path, record: dict[str, Any]) -> None:
        """A small file of this folder, whole or not at all."""
        storage.replace_atomically(path, json_bytes(record))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time writes here; the lock dies with its holder. Raises RunError when it is taken."""
        filesystem.make_folder(self.path)
        with filesystem.guarded(self.path):
            handle = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            if not take(handle):
                raise RunError(f"{self.path}: another process is writing to this run", "wait for it, or use `--output`")
            yield
        finally:
            os.close(handle)


def take(handle: int) -> bool:
    """Try to lock an open file, without waiting; where there are no such locks (Windows), pretend."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
