"""What does not go with a method is told when the recipe is read, with its place, the reason and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftctl import recipe as recipes
from peftctl.errors import RecipeError
from peftctl.methods import METHODS

SET = {
    "trainer.gradient_checkpointing": ("trainer", "gradient_checkpointing: true"),
    "model.quantization": ("model", "quantization: nf4"),
    "method.init_from": ("method", "init_from: somewhere"),
}
CLASHES = [(method, key) for method, cls in METHODS.items() for key in cls.clashes]
NEEDED = {"fusion": "adapters: [one, two]", "prompt": "num_virtual_tokens: 4", "reft": "first: 2", "layers": "top: 1"}


def written(folder: Path, method: str, *lines: tuple[str, str]) -> Path:
    blocks = {"model": ["name_or_path: some/model"], "trainer": ["steps: 1"], "method": [f"type: {method}"]}
    blocks["dataset"] = ["train: somebody/rows"]
    blocks["method"] += [NEEDED[method]] if method in NEEDED else []
    for block, line in lines:
        blocks[block].append(line)
    text = "".join(f"{name}:\n" + "".join(f"  {line}\n" for line in body) for name, body in blocks.items())
    (folder / "recipe.yaml").write_text(text + "output: runs/x\n")
    return folder / "recipe.yaml"


@pytest.mark.parametrize("method", METHODS)
def test_alone_it_is_fine(method: str, tmp_path: Path):
    assert type(recipes.read(written(tmp_path, method)).method) is METHODS[method]


@pytest.mark.parametrize(("method", "key"), CLASHES)
def test_a_clash_is_told_with_place_reason_and_way_out(method: str, key: str, tmp_path: Path):
    block, line = SET[key]
    path = written(tmp_path, method, (block, line))
    number = path.read_text().splitlines().index(f"  {line}") + 1
    why, way_out = METHODS[method].clashes[key]
    with pytest.raises(RecipeError) as caught:
        recipes.read(path)
    [problem] = caught.value.problems
    assert problem.text == f"{path}:{number}:{line.index(':') + 5}: {key}: does not go with `{method}`: {why}"
    assert problem.hint == way_out


def test_overrides_clash_too(tmp_path: Path):
    path = written(tmp_path, "prefix")
    with pytest.raises(RecipeError, match="does not go with `prefix`"):
        recipes.read(path, ["trainer.gradient_checkpointing=true"])
    recipes.read(path, ["trainer.gradient_checkpointing=false"])
