"""What surrounds a run: tokens, paths of modules, the network; and the package itself."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hostile.attack import CANARY, TOKEN, Attack
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "peftctl"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def cold(code: str, folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python, which finds no module of `folder`."""
    given = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(REPOSITORY), "HF_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *words],
        cwd=folder,
        env=given | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


WATCH = """
import sys
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event.startswith(
    ("socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess", "os.system", "os.posix_spawn", "os.fork",
     "os.exec", "pickle.find_class")) else None)
"""


@pytest.mark.parametrize(
    "code", ["import peftctl", "import peftctl.cli", "import peftctl.cli.app; import peftctl; peftctl.attach"]
)
def test_an_import_opens_no_socket_and_starts_no_process(code: str, tmp_path: Path):
    done = cold(f"{WATCH}\n{code}\nprint(seen)", tmp_path)
    assert done.stdout.strip() == "[]", done


def test_the_watch_of_imports_sees(tmp_path: Path):
    done = cold(f"{WATCH}\nimport subprocess; subprocess.run(['true'])\nprint(seen)", tmp_path)
    assert "subprocess.Popen" in done.stdout


MAIN = "import sys; from peftctl.cli import main; sys.exit(main(sys.argv[1:]))"


def test_modules_beside_a_recipe_are_not_imported(tmp_path: Path):
    """The command as it is installed; `python -m peftctl` looks into the working directory first, as Python does."""
    for name in ("yaml", "torch", "typer", "rich", "json", "sitecustomize", "usercustomize", "canary_module"):
        (tmp_path / f"{name}.py").write_text(CANARY)
    (tmp_path / "recipe.yaml").write_text("model: {name_or_path: x}\n")
    done = cold(MAIN, tmp_path, "validate", "recipe.yaml")
    assert done.returncode == 1
    assert done.stderr.startswith("error: recipe.yaml")
    assert not (tmp_path / "sang").exists()


def test_a_module_path_of_strangers_is_what_the_canary_sees(tmp_path: Path):
    """PYTHONPATH is the user's own word, and no boundary: the canary sings, so that the test above can fail."""
    (tmp_path / "yaml.py").write_text(CANARY)
    cold(MAIN, tmp_path, "validate", "recipe.yaml", PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert (tmp_path / "sang").exists()


SLOW = [pytest.mark.slow]


@pytest.mark.parametrize(
    "words",
    [["--offline", "{}"], pytest.param(["{}", "--offline"], marks=SLOW), pytest.param(["{}"], marks=SLOW)],
    ids=str,
)
def test_offline_asks_no_network(words: list[str], tmp_path: Path):
    code = f"""{WATCH}
from peftctl.cli import main
import os, sys
code = main(sys.argv[1:])
print(code, os.environ.get("HF_HUB_OFFLINE"), os.environ.get("HF_HUB_DISABLE_TELEMETRY"), seen)
"""
    recipe = "model: {name_or_path: evil/none}\nmethod: {type: lora}\ndataset: {train: r.jsonl}\noutput: run\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n' * 4)
    given = [each for word in words for each in (["data", "recipe.yaml"] if word == "{}" else [word])]
    env = {} if "--offline" in words else {"HF_HUB_OFFLINE": "1"}
    done = cold(code, tmp_path, *given, **env)
    assert done.stdout.strip() == "1 1 1 []", done
    assert "the hub cannot be reached" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_a_save_makes_no_network_call(attack: Attack):
    """Offline is not said here: a call would be made, and seen."""
    attack.recipe(trainer={"steps": 1, "fast": "off"})
    online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    attack.harmless("train", "recipe.yaml", writes=["run"], within=20, swelling=600, **online)
    attack.harmless("merge", "run", "--output", "merged", writes=["."], within=20, swelling=600, **online)
    attack.harmless("export", "run", "--format", "peft", "--output", "out", writes=["."], within=20, **online)
    for path in attack.work.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "words", [["train", TOKEN], ["data", "recipe.yaml", f"seed={TOKEN}"]], ids=["a name", "a value"]
)
def test_a_token_that_is_typed_is_told_to_its_user_alone(words: list[str], attack: Attack):
    """What was typed comes back in the error, on standard error, and is written nowhere."""
    attack.recipe()
    attack.run(*words)
    assert not [
        path
        for path in attack.root.rglob("*")
        if path.is_file() and TOKEN in attack.text(path) and "reports" not in str(path)
    ]


@pytest.mark.parametrize(
    "env",
    [
        {"PEFTCTL_WORKERS": "999999999999"},
        {"PEFTCTL_WORKERS": "\u0663"},
        {"COLUMNS": "-1"},
        {"COLUMNS": "99999999999999999999"},
        {"LANG": "evil", "LC_ALL": "x"},
        {"HOME": "/nonexistent"},
        {"RANK": "evil"},
        {"LOCAL_WORLD_SIZE": "1"},
        {"CI": "\x1b[2J"},
        {"TERM": "\x1b[2J"},
    ],
    ids=str,
)
def test_an_odd_environment_harms_nothing(env: dict[str, str], attack: Attack):
    attack.recipe()
    attack.harmless("data", "recipe.yaml", **env)


def test_a_cache_that_cannot_be_is_done_without(attack: Attack):
    (attack.work / "loop").symlink_to("loop")
    attack.recipe()
    attack.harmless("data", "recipe.yaml", writes=["loop"], PEFTCTL_HOME=str(attack.work / "loop"))


def test_an_output_that_links_to_itself(attack: Attack):
    (attack.work / "loop").symlink_to("loop")
    attack.recipe(output="loop", trainer={"steps": 1, "fast": "off"})
    attack.refused("train", "recipe.yaml", telling="loop", writes=["loop"])


# The package


CALLS = {
    ("torch", "load"),
    ("os", "system"),
    ("os", "popen"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("marshal", "loads"),
}
NAMES = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "dill", "cloudpickle", "shelve", "joblib", "marshal", "telnetlib", "ftplib", "smtplib", "requests"}


def dangers(path: Path) -> list[str]:
    """What a source does that runs what others wrote."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            found.append(f"{node.func.id}()")
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            called = (node.func.value.id, node.func.attr)
            found += [".".join(called)] if called in CALLS else []
        for word in node.keywords:
            said = word.value.value if isinstance(word.value, ast.Constant) else None
            if (word.arg, said) in (("shell", True), ("trust_remote_code", True), ("weights_only", False)):
                found.append(f"{word.arg}={said}")
            if word.arg == "use_safetensors" and said is False:
                found.append("use_safetensors=False")
    return found


def test_nothing_in_the_package_runs_what_others_wrote():
    assert len(SOURCES) > 200
    assert {path: found for path in SOURCES if (found := dangers(path))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('x')",
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('x')",
        "import yaml\nyaml.load('x')",
        "f(shell=True)",
        "f(trust_remote_code=True)",
        "f(use_safetensors=False)",
    ],
)
def test_the_scan_sees(text: str, tmp_path: Path):
    path = tmp_path / "x.py"
    path.write_text(text)
    assert dangers(path)


def test_every_loading_says_that_code_is_not_trusted():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
            ):
                said: dict[Any, Any] = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                assert said.get("trust_remote_code", False) is False, f"{path}:{node.lineno}"


FLOORS = {
    # CVE-2025-32434 and CVE-2026-24747: torch.load, though we never call it
    "torch": "2.10",
    # CVE-2026-4372: code from `_attn_implementation_internal` with trust off
    "transformers": "5.3",
    # CVE-2024-56201, CVE-2024-56326, CVE-2025-27516: ways out of the sandbox
    "jinja2": "3.1.6",
    # CVE-2020-14343 and before: full loaders
    "pyyaml": "6.0.1",
    # headers with holes and overlaps are refused
    "safetensors": "0.6",
    # CVE-2025-48379, CVE-2024-28219: buffer overflows
    "pillow": "11.3",
}
ALLOWED_NEWER = {"torch": "2.11.0", "transformers": "5.17.0"}
"""Releases that must not be shut out."""


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["vision"]]
    return {found.name.lower(): found for found in map(Requirement, lines)}


@pytest.mark.parametrize("name", FLOORS)
def test_dependencies_start_where_holes_are_closed(name: str):
    from packaging.version import Version

    wanted = requirements()[name]
    below = [Version(each.version) for each in wanted.specifier if each.operator == ">="]
    assert max(below) >= Version(FLOORS[name])
    if name in ALLOWED_NEWER:
        assert wanted.specifier.contains(ALLOWED_NEWER[name])


def test_no_telemetry(attack: Attack):
    attack.recipe()
    seen = attack.harmless("validate", "recipe.yaml", "--json")
    assert json.loads(seen.out)["recipes"][0]["ok"]
    text = (PACKAGE / "cli" / "__init__.py").read_text()
    assert re.search("HF_HUB_DISABLE_TELEMETRY", text)
