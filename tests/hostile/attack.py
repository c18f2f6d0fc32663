"""One stranger's files in a folder of their own, and the command lines that a user runs on them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tiny_chat
from engine.folders import configure, made

from peftctl.config.write import to_yaml

TOKEN = "hf_canaryAAAAbbbbCCCCddddEEEEffffGG"
"""Stands in the environment of every child, and must come out nowhere."""

CANARY = "from pathlib import Path\nPath(__file__).with_name('sang').write_text('x')\n"
"""A module that must never be run."""


class Server:
    """The process that forks (`server.py`)."""

    def __init__(self, home: Path, base: Path) -> None:
        here = Path(__file__).parents[1]
        quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        quiet["PYTHONDONTWRITEBYTECODE"] = "1"  # beside a module that a child is the first to import
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
        self.env = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **quiet, **offline}
        self.env["PEFTCTL_HOME"] = str(home / "peftctl")
        good = tiny_chat.recipe(base, tiny_chat.write_rows(home / "rows.jsonl", tiny_chat.chats(8)))
        (home / "recipe.yaml").write_text(to_yaml(good))
        (home / "bad.yaml").write_text(to_yaml(good | {"seed": "x"}))
        configure(made(home / "adapter"), base_model_name_or_path=str(base))
        self.process = subprocess.Popen(
            [sys.executable, str(here / "hostile" / "server.py"), str(home)],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready\n"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.line())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


class Seen(NamedTuple):
    """What came of a command line."""

    code: int | None
    signal: int | None
    out: str
    err: str
    sang: list[str]
    """What the canary saw, and files that changed where none may."""
    seconds: float
    """CPU time."""
    grown: float
    """MB of memory more than before."""


class Attack:
    """`work` is where the user stands, with the stranger's files in it; `outside` is nobody's business."""

    def __init__(self, server: Server, root: Path, base: Path) -> None:
        self.server, self.root, self.base = server, root, base
        self.work, self.outside, self.home = root / "work", root / "outside", root / "home"
        self.site, self.reports = root / "site", root / "reports"
        for folder in (self.work, self.outside, self.home, self.site, self.reports):
            folder.mkdir()
        (self.outside / "secret").write_text("a secret")
        for name in ("canary_module", "megatron", "evil"):
            (self.site / f"{name}.py").write_text(CANARY)

    def write(self, name: str, content: str | bytes) -> Path:
        """A file of the stranger."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def rows(self, rows: Sequence[Any] | None = None, name: str = "rows.jsonl") -> Path:
        """A file of rows, by default of good ones."""
        return tiny_chat.write_rows(self.work / name, tiny_chat.chats(8) if rows is None else rows)

    def recipe(self, **blocks: Any) -> Path:
        """A recipe that would work, with `blocks` laid over it."""
        made = tiny_chat.recipe(blocks.pop("base", self.base), self.work / "rows.jsonl", **blocks)
        if not (self.work / "rows.jsonl").exists():
            self.rows()
        return self.write("recipe.yaml", to_yaml(made))

    def before(self) -> dict[str, bytes]:
        """What must stay as it is."""
        found = [path for folder in (self.outside, self.site) for path in sorted(folder.rglob("*"))]
        return {
            str(path): path.read_bytes() if path.is_file() else b"" for path in found if "__pycache__" not in str(path)
        }

    def run(
        self,
        *words: object,
        writes: Sequence[str] = (),
        seconds: int = 8,
        megabytes: int = 1024,
        terminal: bool = False,
        payload: str | None = None,
        **env: str,
    ) -> Seen:
        """Run a command line in a child; below `work` it may write `writes` alone."""
        was = self.before()
        out, err, report = (self.reports / name for name in ("out", "err", "report"))
        for path in (out, err, report):
            path.write_text("")
        temporary = self.home / "tmp"
        temporary.mkdir(exist_ok=True)
        places = {"HOME": str(self.home), "PEFTCTL_HOME": str(self.home / "peftctl"), "TMPDIR": str(temporary)}
        answer = self.server.ask(
            {
                "words": [str(word) for word in words],
                "payload": payload,
                "cwd": str(self.work),
                "root": str(self.root),
                "env": {**self.server.env, "HF_TOKEN": TOKEN, "COLUMNS": "100", **places, **env},
                "path": [str(self.site)],
                "allowed": [str(self.home), *(str(self.work / name) for name in writes)],
                "out": str(out),
                "err": str(err),
                "report": str(report),
                "seconds": seconds,
                "megabytes": megabytes,
                "terminal": terminal,
            }
        )
        sang = report.read_text(errors="replace").splitlines()
        after = self.before()
        sang += [f"changed {path}" for path in sorted(was.keys() | after.keys()) if was.get(path) != after.get(path)]
        sang += ["hung"] if answer["hung"] else []
        told = (
            (answer["screen"], "") if terminal else (out.read_text(errors="replace"), err.read_text(errors="replace"))
        )
        if TOKEN in "".join(told) or any(TOKEN in self.text(path) for path in self.work.rglob("*") if path.is_file()):
            sang.append("the token came out")
        return Seen(answer["code"], answer["signal"], *told, sang, answer["seconds"], answer["grown"])

    @staticmethod
    def text(path: Path) -> str:
        """What a small file says."""
        return path.read_bytes().decode("latin-1") if path.stat().st_size < 1 << 22 else ""

    def harmless(self, *words: object, code: int | None = 0, **options: Any) -> Seen:
        """Run a command line that ends with `code`, or with 0 or 1 for None, and nothing else comes of it."""
        within, swelling = options.pop("within", 4.0), options.pop("swelling", 300.0)
        seen = self.run(*words, **options)
        assert not seen.sang, seen
        assert seen.signal is None, seen
        assert seen.code in ((0, 1) if code is None else (code,)), seen
        assert "Traceback" not in seen.err, seen.err
        assert seen.seconds < within, seen.seconds
        assert seen.grown < swelling, seen.grown
        return seen

    def refused(self, *words: object, telling: str, code: int = 1, **options: Any) -> Seen:
        """Run a command line that is refused, with an error that matches `telling`: `error: place: what`."""
        seen = self.harmless(*words, code=code, **options)
        errors = [line for line in seen.err.splitlines() if line.startswith("error: ")]
        assert errors, seen.err
        placed = [line for line in errors if not line.startswith("error: ... and ")]
        assert all(": " in line.removeprefix("error: ") for line in placed), errors
        assert all(len(line) < 2000 for line in errors), [len(line) for line in errors]
        assert all(line.isprintable() for line in seen.err.splitlines()), seen.err
        assert re.search(telling, seen.err), seen.err
        return seen
