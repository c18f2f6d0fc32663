"""Run folders and checkpoints of strangers: text and numbers, verified, and no way to write elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
from hostile.attack import CANARY, TOKEN, Attack, Server
from hostile.test_base_folders import EVIL

TRAINER = {"steps": 4, "fast": "off", "save_every": 2}


@pytest.fixture(scope="session")
def begun(server: Server, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was finished, where others stand after it."""
    attack = Attack(server, tmp_path_factory.mktemp("begun"), base)
    attack.recipe(trainer=TRAINER, dataset={"train": "rows.jsonl"})
    attack.harmless("train", "recipe.yaml", writes=["run"], within=30, swelling=700)
    return attack.work


@pytest.fixture
def run(attack: Attack, begun: Path) -> Path:
    """An unfinished run of a stranger, at the place that its recipe says."""
    for name in ("recipe.yaml", "rows.jsonl"):
        shutil.copy(begun / name, attack.work / name)
    shutil.copytree(begun / "run", attack.work / "run")
    shutil.rmtree(attack.work / "run" / "adapter")
    recipe = attack.work / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(begun), str(attack.work)))
    return attack.work / "run"


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-000004"


def sealed(folder: Path) -> None:
    """A manifest that fits the folder: a stranger can make one, too."""
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": files}))


@pytest.mark.slow
def test_a_good_one_goes_on(run: Path, attack: Attack):
    attack.harmless("train", "recipe.yaml", "--resume", writes=["run"], within=20, swelling=600)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def state(**changes: Any) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        for folder in (newest(run), run / "checkpoints" / "step-000002"):
            record = json.loads((folder / "state.json").read_text())
            (folder / "state.json").write_text(json.dumps(record | changes))
            sealed(folder)

    return spoil


def writing(name: str, content: bytes) -> Callable[[Path], None]:
    """A file of every checkpoint, with a manifest that fits."""

    def spoil(run: Path) -> None:
        for folder in (newest(run), run / "checkpoints" / "step-000002"):
            (folder / name).write_bytes(content)
            if name != "manifest.json":
                sealed(folder)

    return spoil


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def replaced(name: str, content: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        (run / name).write_text(content)

    return spoil


def swapped(run: Path) -> None:
    """The recipe of the folder asks for another base, and another place to write to."""
    recipe = run / "recipe.yaml"
    text = recipe.read_text().replace("output: run", "output: ../../outside/x")
    recipe.write_text(text)


BRACKETS = b'{"a": ' + b"[" * 200_000

SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "a recipe that leaves": (swapped, "does not lie below the working directory"),
    "a recipe of tags": (replaced("recipe.yaml", "seed: !!python/object/apply:os.system [id]\n"), "tags"),
    "provenance of brackets": (replaced("provenance.json", BRACKETS.decode()), "provenance.json: damaged"),
    "provenance that is a list": (replaced("provenance.json", "[1]"), "provenance.json|data changed"),
    "provenance of other data": (replaced("provenance.json", "{}"), "the data changed"),
    "state of brackets": (writing("state.json", BRACKETS), "state.json"),
    "pickled state": (writing("state.json", EVIL), "state.json"),
    "state of another format": (state(format=99), "format 99"),
    "a step of text": (state(step="4"), "holds step|state.json"),
    "a step of a list": (state(step=[4]), "holds step|state.json"),
    "a step beyond all": (state(step=10**30), "holds step"),
    "surroundings of a list": (state(surroundings=[1]), "state.json"),
    "a schedule of text": (state(scheduler="evil"), "state.json|checkpoint"),
    "a schedule by name": (state(scheduler={"$": "object", "name": "os.system"}), "state.json"),
    "groups of text": (state(optimizer="evil"), "state.json|checkpoint"),
    "state of nothing": (state(state={}), "state.json|checkpoint"),
    "a pickle for tensors": (writing("trainable.safetensors", EVIL), "trainable.safetensors"),
    "a pickle for moments": (writing("optimizer.safetensors", EVIL), "optimizer.safetensors"),
    "a pickle for chance": (writing("rng.safetensors", EVIL), "rng.safetensors"),
    "a header of exabytes": (writing("trainable.safetensors", b"\xff" * 8 + b"{}"), "trainable.safetensors"),
}

QUICK = (
    "run.lock",
    "metrics.jsonl",
    "a recipe that leaves",
    "a recipe of tags",
    "provenance of other data",
    "state of another format",
)
SLOW = [pytest.mark.slow]  # each of them trains


def cases(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else SLOW) for name in names]


@pytest.mark.parametrize("name", cases(SPOILT))
def test_a_run_is_refused(name: str, run: Path, attack: Attack):
    spoil, telling = SPOILT[name]
    spoil(run)
    # damaged ones are passed over, so that training may begin anew: then nothing of theirs is used, and it is said
    seen = attack.run("train", "recipe.yaml", "--resume", writes=["run"], seconds=20)
    assert not seen.sang, seen
    assert seen.code in (0, 1), seen
    assert "Traceback" not in seen.err
    assert re.search(telling, seen.err), seen.err
    assert not (attack.work / "pwned").exists()


@pytest.mark.slow
def test_a_manifest_names_what_is_outside(run: Path, attack: Attack):
    manifest = json.loads((newest(run) / "manifest.json").read_text())
    manifest["files"]["../../../../outside/secret"] = {"size": 8, "sha256": "0" * 64}
    (newest(run) / "manifest.json").write_text(json.dumps(manifest))
    seen = attack.harmless("train", "recipe.yaml", "--resume", writes=["run"], within=20, swelling=600)
    assert "step-000004 is damaged" in seen.err


LINKS = ["run.lock", "metrics.jsonl", "provenance.json", "checkpoints", "adapter", "eval.json", "start"]


@pytest.mark.parametrize("name", cases(LINKS))
def test_a_link_leads_nowhere(name: str, run: Path, attack: Attack):
    target = attack.outside / name
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    if name in ("checkpoints", "adapter", "start"):
        target.mkdir()
        (target / ".tmp-precious").write_text("not yours")
    else:
        target.write_text("{}")
    (run / name).symlink_to(target)
    seen = attack.run("train", "recipe.yaml", "--resume", writes=["run"], seconds=20)
    assert not seen.sang, seen
    assert "Traceback" not in seen.err, seen.err
    assert seen.code in (0, 1)


def test_a_run_that_is_a_link(run: Path, attack: Attack):
    """The folder that `output` names lies elsewhere: only `--output` may write there."""
    shutil.rmtree(run)
    (attack.work / "run").symlink_to(attack.outside)
    attack.refused("train", "recipe.yaml", telling="run|output")


def test_an_output_below_a_link(attack: Attack):
    (attack.work / "runs").symlink_to(attack.outside)
    attack.recipe(trainer=TRAINER, output="runs/x")
    attack.refused("train", "recipe.yaml", telling="does not lie below the working directory")


def test_an_output_elsewhere_by_flag(attack: Attack):
    attack.recipe(trainer=TRAINER | {"steps": 1})
    elsewhere = attack.home / "elsewhere"
    attack.harmless("train", "recipe.yaml", "--output", elsewhere, within=20, swelling=600)
    assert (elsewhere / "adapter").is_dir()


@pytest.mark.parametrize("name", ["merged", "exported"])
def test_a_place_that_is_a_link(name: str, run: Path, begun: Path, attack: Attack):
    (attack.work / name).symlink_to(attack.outside)
    words = {"merged": ["merge", begun / "run"], "exported": ["export", begun / "run", "--format", "peft"]}[name]
    attack.refused(*words, "--output", name, telling=name)


def test_a_finished_run_of_a_stranger(begun: Path, attack: Attack):
    shutil.copytree(begun / "run", attack.work / "theirs")
    (attack.work / "theirs" / "evil.py").write_text(CANARY)
    recipe = attack.work / "theirs" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "evaluate: {command: id}\n")
    for words in (["generate", "theirs", "hi"], ["eval", "theirs"], ["merge", "theirs", "--output", "x"]):
        attack.refused(*words, telling="evaluate: unknown key")


def test_nothing_that_is_written_has_the_token(begun: Path):
    for path in begun.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    assert tiny_chat.journal(begun / "run")
    assert os.environ.get("HF_TOKEN") != TOKEN
