"""`metrics.jsonl`: one line per event, the same to the console; after a resume it reads as if never interrupted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peftctl.errors import StorageError
from peftctl.training import filesystem, storage


class Journal:
    """Appends events to a file and passes them to `listener`.

    Opening it at `step` (0 for a new run, else the step of the checkpoint) drops the lines of later steps and any
    line that a crash tore. So write the events of a step before its checkpoint, and nothing about resuming.
    Lines that the disk refuses are kept and tried again with the next one; `close` raises StorageError when it refuses
    them still.
    """

    def __init__(
        self, path: Path, *, step: int = 0, listener: Callable[[dict[str, Any]], object] | None = None
    ) -> None:
        self._path, self._listener = path, listener
        _rewind(path, step)
        self._file = filesystem.open_end(path)
        self._pending = b""

    def write(self, event: Mapping[str, Any]) -> None:
        """One event, such as `{"event": "train", "step": 10, "loss": 1.5}`; NaN and infinities become text."""
        refused = bool(self._pending)
        self._pending += json.dumps(_finite(event), allow_nan=False).encode() + b"\n"
        try:
            self._append()
        except StorageError as error:
            if not refused:
                [(text, hint), *_] = error.problems
                self._tell({"event": "warning", "text": f"{text}; its lines are kept in memory", "hint": hint})
        self._tell(dict(event))

    def _append(self) -> None:
        if self._pending:
            filesystem.append(self._file, self._path, self._pending)
            self._pending = b""

    def _tell(self, event: dict[str, Any]) -> None:
        if self._listener is not None:
            self._listener(event)

    def sync(self) -> None:
        """Makes what was written survive a loss of power; call it before a checkpoint is saved."""
        filesystem.sync(self._path)

    def close(self) -> None:
        try:
            self._append()
        finally:
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        with suppress(StorageError) if kind is not None else nullcontext():  # what ended the run is what is told
            self.close()


def _rewind(path: Path, step: int) -> None:
    """Cuts the file before the first event after `step`, and drops what is no event."""
    with filesystem.guarded(path):
        if not path.exists():
            return
        data = path.read_bytes()
    kept = []
    for line in data.splitlines(keepends=True):
        event = _parse(line)
        if event is None or not line.endswith(b"\n"):
            continue
        if isinstance(event.get("step"), int) and event["step"] > step:
            break
        kept.append(line)
    if (text := b"".join(kept)) != data:
        storage.replace_atomically(path, text)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
