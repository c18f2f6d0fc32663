"""The fast path is a folder that the rest does not need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peftctl
from tests.tiny_chat import chats, recipe, write_base, write_rows


def test_without_the_folder_everything_works(tmp_path: Path) -> None:
    here = Path(peftctl.__file__).parent
    shutil.copytree(here, tmp_path / "peftctl", ignore=shutil.ignore_patterns("fast", "__pycache__"))
    base, rows = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", chats(8))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(base, rows)))
    gone = "from importlib.util import find_spec; assert find_spec('peftctl.fast') is None"
    for words in (["-c", gone], ["-m", "peftctl", "train", "recipe.yaml"]):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
