"""Every recipe that comes with peftctl, and the one in README.md, validates without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from peftctl import bundled
from peftctl import recipe as recipes
from peftctl.cli import main
from peftctl.config.document import parse
from peftctl.methods import METHODS
from peftctl.tasks import TASKS
from peftctl.tasks.task import name_of

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
OF_MODELS = sorted((ROOT / "recipes").glob("*.yaml"))
OF_METHODS = sorted((ROOT / "recipes" / "methods").glob("*.yaml"))
README = ROOT / "README.md"


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def settings(path: Path) -> dict[str, Any]:
    return dict(parse(path.read_text(), path.name).data)


def test_a_recipe_validates_and_reads_back(file: Path):
    read = recipes.read(file)
    assert recipes.build(parse(recipes.dump(read), "again"), Path(".")) == read


def test_a_recipe_says_what_it_is_for(file: Path):
    first, *rest = file.read_text().splitlines()
    assert re.fullmatch(r"# .{20,100}", first)
    name = file.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    assert any(f"peftctl train {name}" in line for line in rest), "the command to type"
    assert recipes.read(file).output == f"runs/{file.stem}"


@pytest.mark.parametrize("file", OF_MODELS, ids=lambda path: path.stem)
def test_a_recipe_keeps_what_its_name_promises(file: Path):
    read, words = recipes.read(file), re.split(r"[-.]", file.stem)
    kind = settings(file)["method"]["type"]
    assert read.model.quantization == ("nf4" if kind == "qlora" else "none")
    named = [word for word in words if word in (*METHODS, "qlora")]
    assert named == [kind] or (not named and kind in ("lora", "ia3"))
    tasks = [word for word in words if word in TASKS and word != "text"]
    assert not tasks or tasks == [name_of(read.trainer.task)]


def test_every_method_has_its_recipe():
    assert {path.stem for path in OF_METHODS} >= set(METHODS)


@pytest.mark.parametrize("file", OF_METHODS, ids=lambda path: path.stem)
def test_a_recipe_of_a_method_is_one_of_that_method(file: Path):
    kind = settings(file)["method"]["type"]
    assert kind in (recipes.method_name(recipes.read(file).method), "qlora")
    assert file.stem == kind or file.stem.startswith(f"{kind}_")


@pytest.mark.parametrize("file", OF_MODELS, ids=lambda path: path.stem)
def test_its_data_comes_with_it_or_is_its_users(file: Path):
    read = recipes.read(file)
    ours = "tweets" in read.dataset.train
    for path in (read.dataset.train, read.dataset.eval):
        if isinstance(path, str):
            assert Path(path).is_file() == ours
    assert ours == (file.stem.startswith("smollm2") or "tweets" in file.stem)


@pytest.mark.parametrize("name", ["smollm2", "llama7b", "llama3.1-8b", "qwen3-8b", "mistral7b"])
def test_the_promised_models_are_there(name: str):
    stems = {path.stem for path in FILES}
    assert f"{name}-qlora" in stems
    assert f"{name}-lora" in stems or name == "llama7b"


def test_a_base_llama_2_gets_a_template():
    assert recipes.read(ROOT / "recipes" / "llama7b-qlora.yaml").dataset.chat_template == "llama2"


def test_validate_takes_them_all_by_file_and_by_name(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert main(["validate", *map(str, FILES), *bundled.names()]) == 0
    assert capsys.readouterr().out.count(": ok\n") == 2 * len(FILES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_recipe_of_the_readme_validates():
    [text] = [block for block in blocks("yaml") if "name_or_path" in block]
    read = recipes.build(parse(text, "README.md"), ROOT)
    bundled_one = recipes.read(ROOT / "recipes" / "llama7b-qlora.yaml")
    assert (read.model, read.method.r, read.method.alpha) == (bundled_one.model, 16, 32)
    assert read.dataset.chat_template == bundled_one.dataset.chat_template
    assert read.output == bundled_one.output


def test_the_mistakes_of_the_readme_are_told_as_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    [shown] = [block for block in blocks("text") if block.startswith("$ peftctl validate bad.yaml")]
    monkeypatch.chdir(tmp_path)
    lines = ["model:", "  name_or_path: x", "  quantise: nf4", "method:", "  type: lora", "  r: 16", "  alpha: big"]
    Path("bad.yaml").write_text("\n".join([*lines, "dataset: {train: a.jsonl}", "output: runs/x", ""]))
    assert main(["validate", "bad.yaml"]) == 1
    assert capsys.readouterr().err.splitlines() == shown.splitlines()[1:]
