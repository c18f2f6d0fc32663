from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SESSIONS = Path(__file__).parent / "help.txt"
TOP = [
    "init",
    "data",
    "plan",
    "train",
    "bench",
    "eval",
    "merge",
    "export",
    "generate",
    "validate",
    "schema",
    "selftest",
    "methods",
    "tasks",
    "recipes",
    "adapters",
]
COMMANDS = [*TOP, "recipes show", "recipes copy"]
COMMANDS += [f"adapters {verb}" for verb in ("inspect", "diff", "combine", "resize", "convert")]
HEAVY = {"torch", "transformers", "datasets", "pydantic", "numpy", "rich", "yaml", "safetensors"}


def test_help_of_every_command(peftctl):
    """Every page as it was when last looked at; UPDATE_SESSIONS=1 writes it anew."""
    pages = []
    for command in ["", *COMMANDS]:
        session = peftctl(*command.split(), "--help")
        assert (session.code, session.err) == (0, "")
        pages.append(" ".join(f"$ peftctl {command} --help".split()) + f"\n{session.out}")
    text = "\n".join(pages)
    if os.environ.get("UPDATE_SESSIONS"):
        SESSIONS.write_text(text, encoding="utf-8")
    assert text == SESSIONS.read_text(encoding="utf-8")


def test_there_are_exactly_these_commands():
    from peftctl.cli.adapters import adapters
    from peftctl.cli.app import app
    from peftctl.cli.recipes import recipes

    def named(group):
        return {item.name or item.callback.__name__ for item in group.registered_commands}

    assert named(app) | {group.name for group in app.registered_groups} == set(TOP)
    assert named(recipes) == {"show", "copy"}
    assert named(adapters) == {"inspect", "diff", "combine", "resize", "convert"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_narrow_terminal(peftctl, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "40")
    page = peftctl(*command.split(), "-h").out.partition("\nexamples:")[0]
    assert page
    assert max(map(len, page.splitlines())) <= 40


def test_no_command_shows_the_help_as_an_error(peftctl):
    session = peftctl()
    assert session.code == 2
    assert session.out == ""
    assert session.err == peftctl("--help").out


def test_version(peftctl):
    import peftctl as package

    assert peftctl("--version").out == f"peftctl {package.__version__}\n"


def test_help_is_quick_and_imports_nothing_heavy():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "peftctl", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5, f"`peftctl --help` took {min(seconds):.2f} s"

    script = "import sys; from peftctl.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stderr
    assert "typer" in found.split()
    assert not HEAVY & set(found.split())
