"""What a hostile file must never bring about: an audit hook that notes it, and payloads that do it to try the hook."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESSES = ("os.exec", "os.system", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn")
NEVER = (
    *PROCESSES,
    *("subprocess.Popen", "pickle.find_class", "webbrowser.open", "urllib.Request"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"),
)
"""Events of Python's audit that no command has a reason for while it reads what a stranger wrote."""

CHANGES = {
    **{"os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0, "os.chmod": 0, "os.chown": 0, "os.utime": 0},
    **{"os.rename": 1, "os.link": 1, "os.symlink": 1, "shutil.rmtree": 0},
}
"""Events that change a folder, and which of their arguments is the path that changes."""

STRANGERS = ("canary", "megatron", "evil")
"""Beginnings of the names of modules that hostile files ask for."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(report: int, root: str, allowed: list[str]) -> None:
    """From now on, write a line to the file descriptor `report` for everything that must not happen, and forbid it.

    `root` holds what the stranger wrote, no code of which may run; files may change below `allowed` alone.
    """
    root, fine = os.path.realpath(root), tuple(os.path.realpath(path) + os.sep for path in [*allowed, "/dev"])

    def inside(path: Any) -> bool:
        if not isinstance(path, str | bytes) or not os.path.isabs(path):  # `<string>`, which has no file
            return False
        return os.path.realpath(os.fsdecode(path)).startswith(root + os.sep)

    def elsewhere(path: Any, folder: Any = None) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a file descriptor: its opening was looked at
        start = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else ""
        text = os.path.join(start, os.fsdecode(path))
        parent = os.path.realpath(os.path.dirname(text) or ".")
        return not (os.path.join(parent, os.path.basename(text)) + os.sep).startswith(fine) or (
            os.path.islink(text) and not (os.path.realpath(text) + os.sep).startswith(fine)
        )

    def wrong(event: str, arguments: tuple[Any, ...]) -> bool:
        if event in NEVER:
            return True
        if event == "open":
            refused = arguments[2] & os.O_NOFOLLOW and isinstance(arguments[0], str) and os.path.islink(arguments[0])
            return bool(arguments[2] & WRITES) and not refused and elsewhere(arguments[0])
        if event in CHANGES:
            return elsewhere(arguments[CHANGES[event]], None if event == "os.truncate" else arguments[-1])
        if event == "import":
            return str(arguments[0]).startswith(STRANGERS)
        if event == "exec":
            return inside(getattr(arguments[0], "co_filename", None))
        return event == "compile" and inside(arguments[1])

    busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            bad = wrong(event, arguments)
        finally:
            busy = False
        if bad:
            os.write(report, f"{event} {arguments!r}"[:500].replace("\n", " ").encode() + b"\n")
            raise RuntimeError(f"the canary sang: {event}")

    sys.addaudithook(hook)


def write_outside(root: Path) -> None:
    (root.parent / "outside" / "pwned").write_text("x")


def link_outside(root: Path) -> None:
    (root / "run").mkdir()
    (root / "run" / "log").symlink_to(root.parent / "outside" / "secret")
    (root / "run" / "log").write_text("x")


def run_pickle(root: Path) -> None:
    import pickle

    pickle.loads(b"cos\nsystem\n(S'true'\ntR.")


def connect(root: Path) -> None:
    import socket

    socket.create_connection(("127.0.0.1", 9), timeout=0.1)


def import_stranger(root: Path) -> None:
    (root / "innocent.py").write_text("x = 1")
    sys.path.insert(0, str(root))
    import innocent  # type: ignore[import-not-found]  # noqa: F401


def import_by_name(root: Path) -> None:
    __import__("canary_module")


def write_by_native_code(root: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, root.parent / "outside" / f"{os.getpid()}.safetensors")


def popen(root: Path) -> None:
    import subprocess

    subprocess.run(["true"], check=True)


def swallow(root: Path) -> None:
    try:
        os.system("true")
    except RuntimeError:
        print("as if nothing had happened")


def forever(root: Path) -> None:
    while True:
        pass


def sleep(root: Path) -> None:
    import time

    time.sleep(1000)


def swell(root: Path) -> None:
    _ = bytearray(3 << 30)


def swell_a_little(root: Path) -> None:
    held = bytearray(400 << 20)
    for at in range(0, len(held), 4096):
        held[at] = 1


def tell_the_token(root: Path) -> None:
    print(os.environ["HF_TOKEN"])


def keep_the_token(root: Path) -> None:
    (root / "log").write_text(os.environ["HF_TOKEN"])


def traceback(root: Path) -> None:
    raise ZeroDivisionError


def die(root: Path) -> None:
    os.abort()


PAYLOADS: dict[str, Callable[[Path], None]] = {
    payload.__name__: payload
    for payload in (
        *(write_outside, link_outside, run_pickle, connect, import_stranger, import_by_name, write_by_native_code),
        *(popen, swallow, forever, sleep, swell, swell_a_little, tell_the_token, keep_the_token, traceback, die),
    )
}
