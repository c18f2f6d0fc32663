"""The workflow file that the README shows: it is whole, and its command lines are ones that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / "docs" / "ci.yml"


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    whole = yaml.safe_load(WORKFLOW.read_text())
    assert True in whole  # YAML 1.1 reads `on` as true; GitHub does not
    [job] = whole["jobs"].values()
    return list(job["steps"])


def test_the_readme_shows_the_file():
    assert f"```yaml\n{WORKFLOW.read_text()}```" in (ROOT / "README.md").read_text()


def test_every_step_does_one_thing(steps: list[dict[str, Any]]):
    for step in steps:
        assert ("run" in step) != ("uses" in step)
        assert step.keys() <= {"run", "uses", "with", "if"}
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/x@v1"))


def test_its_commands_exist_with_their_options(steps: list[dict[str, Any]], peftctl: Any):
    lines = [shlex.split(step["run"], comments=True) for step in steps if step.get("run", "").startswith("peftctl ")]
    assert [words[1] for words in lines] == ["validate", "train", "train", "eval"]
    for _, command, *words in lines:
        page = peftctl(command, "--help").out
        for option in (word for word in words if word.startswith("--")):
            assert f"{option} " in page


def test_what_is_uploaded_is_what_eval_writes(steps: list[dict[str, Any]]):
    [upload] = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    [command] = [step["run"] for step in steps if "peftctl eval" in step.get("run", "")]
    files = upload["with"]["path"].split()
    assert files[:2] == [word for word in shlex.split(command, comments=True) if "." in word]
    assert upload["if"] == "always()"
