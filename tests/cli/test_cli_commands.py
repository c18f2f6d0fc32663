from __future__ import annotations

from pathlib import Path

import pytest

from peftctl.errors import Problem, RecipeError
from peftctl.verbs.asked import Asked


def test_train(peftctl, verbs):
    session = peftctl("train", "my.yaml", "trainer.steps=50", "method.r=4", "--output", "out", "--resume")
    assert (session.code, session.out, session.err) == (0, "runs/x\n", "")
    assert verbs.read.calls == [(("my.yaml", ["trainer.steps=50", "method.r=4"]), {})]
    assert verbs.train.calls == [
        (("the recipe",), {"output": Path("out"), "resume": True, "strict_resume": False, "dry_run": False})
    ]


def test_train_takes_options_between_its_words(peftctl, verbs):
    peftctl("train", "--json", "my.yaml", "--resume", "seed=1")
    assert verbs.read.calls == [(("my.yaml", ["seed=1"]), {})]


def test_train_by_default(peftctl, verbs):
    peftctl("train", "my.yaml")
    assert verbs.read.calls == [(("my.yaml", []), {})]
    assert verbs.train.calls == [
        (("the recipe",), {"output": None, "resume": False, "strict_resume": False, "dry_run": False})
    ]


def test_json_is_the_whole_result(peftctl, verbs):
    verbs.train.result = {"path": Path("runs/x"), "loss": float("nan"), "deep": [{"rate": float("inf")}], "ok": True}
    session = peftctl("train", "my.yaml", "--json")
    assert session.json() == {"path": "runs/x", "loss": "nan", "deep": [{"rate": "inf"}], "ok": True}


def test_a_dry_run_prints_no_path(peftctl, verbs):
    assert peftctl("train", "my.yaml", "--dry-run").out == ""
    assert verbs.train.calls[0][1]["dry_run"] is True
    assert peftctl("train", "my.yaml", "--dry-run", "--json").json() == {"path": "runs/x", "steps": 3}


def test_of_several_processes_one_prints(peftctl, verbs, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert peftctl("train", "my.yaml", "--json").out == ""
    monkeypatch.setenv("RANK", "0")
    assert peftctl("train", "my.yaml").out == "runs/x\n"


def test_eval(peftctl, verbs):
    assert peftctl("eval", "runs/x", "eval.batch_size=1", "--adapter", "a").out == "runs/x/eval.json\n"
    files = {"junit_file": None, "markdown_file": None}
    given = {"overrides": ["eval.batch_size=1"], "adapter": "a", "asked": Asked(), **files}
    assert verbs.evaluate.calls == [(("runs/x",), given)]
    words = ["--data", "a.jsonl", "--data", "b=b.jsonl", "--set", "b", "--metrics", "loss, bleu", "--labels", "x,y z"]
    peftctl("eval", "runs/x", *words, "--max-rows", "3", "--junit", "j.xml", "--markdown", "m.md")
    asked = Asked(data=("a.jsonl", "b=b.jsonl"), set="b", metrics=("loss", "bleu"), labels=("x", "y z"), max_rows=3)
    files = {"junit_file": Path("j.xml"), "markdown_file": Path("m.md")}
    assert verbs.evaluate.calls[1] == (("runs/x",), {"overrides": [], "adapter": None, "asked": asked, **files})


def test_merge(peftctl, verbs):
    words = ["merge", "runs/x", "--output", "m", "--into", "dequantised", "--base", "b"]
    assert peftctl(*words).out == "merged\n"
    assert verbs.merge.calls == [(("runs/x", Path("m")), {"into": "dequantised", "base": "b"})]
    peftctl("merge", "runs/x", "--output", "m")
    assert verbs.merge.calls[1] == (("runs/x", Path("m")), {"into": None, "base": None})


def test_export(peftctl, verbs):
    assert peftctl("export", "runs/x", "--format", "peft", "--output", "e").out == "exported\n"
    assert verbs.export.calls == [(("runs/x", Path("e")), {"format": "peft"})]


def test_generate(peftctl, verbs):
    defaults = {"temperature": 0.7, "top_p": 0.9, "beams": 1, "max_new_tokens": 128, "seed": 0, "output": None}
    assert peftctl("generate", "runs/x", "What?").out == "a llama\n"
    assert verbs.generate.calls == [(("runs/x", "What?"), {"base": False, "sample": False, **defaults})]
    numbers = ["--temperature", "1", "--top-p", "0.5", "--beams", "4", "--max-new-tokens", "9", "--seed", "7"]
    peftctl("generate", "runs/x", "What?", "--base", "--sample", *numbers)
    chosen = {"temperature": 1.0, "top_p": 0.5, "beams": 4, "max_new_tokens": 9, "seed": 7, "output": None}
    assert verbs.generate.calls[1] == (("runs/x", "What?"), {"base": True, "sample": True, **chosen})


def test_generate_takes_any_text(peftctl, verbs):
    peftctl("generate", "runs/x", "--", "--json")
    assert verbs.generate.calls[0][0] == ("runs/x", "--json")


def test_validate_lays_changes_over_every_recipe(peftctl, verbs):
    session = peftctl("validate", "a.yaml", "method.r=4", "b.yaml", "seed=1")
    assert session.out == "a.yaml: ok\nb.yaml: ok\n"
    assert [call[0] for call in verbs.read.calls] == [(name, ["method.r=4", "seed=1"]) for name in ("a.yaml", "b.yaml")]


def test_validate_tells_every_mistake_of_every_file(peftctl, verbs):
    mistakes = [Problem("b.yaml:1:1: seed: no", "yes"), Problem("b.yaml:2:1: model: no")]

    def read(name, changes):
        if name == "b.yaml":
            raise RecipeError.of(mistakes)

    verbs.read.result = read
    session = peftctl("validate", "a.yaml", "b.yaml", "c.yaml")
    assert session.code == 1
    assert session.out == "a.yaml: ok\nc.yaml: ok\n"
    assert session.err == "error: b.yaml:1:1: seed: no\n  hint: yes\nerror: b.yaml:2:1: model: no\n"

    session = peftctl("validate", "a.yaml", "b.yaml", "--json")
    assert session.code == 1
    assert session.json() == {
        "recipes": [{"recipe": "a.yaml", "ok": True}, {"recipe": "b.yaml", "ok": False}],
        "error": [{"text": mistakes[0].text, "hint": "yes"}, {"text": mistakes[1].text, "hint": None}],
    }
    session = peftctl("validate", "a.yaml", "--json")
    assert (session.code, session.json()) == (0, {"recipes": [{"recipe": "a.yaml", "ok": True}]})


def test_schema(peftctl, verbs):
    assert peftctl("schema").json() == {"title": "recipe"}


METHOD = {
    "name": "lora",
    "title": "LoRA: low-rank updates.",
    "paper": "arXiv:2106.09685",
    "learning_rate": 2e-4,
    "peft": "LORA",
    "page": "LoRA: low-rank updates.\n\ny = W x + s B A x",
    "fields": [
        {"name": "r", "type": "whole number", "required": False, "default": 16, "doc": "Rank of the update."},
        {"name": "bias", "type": "one of none, all", "required": False, "default": "none", "doc": "Biases trained."},
        {"name": "init_r", "type": "whole number", "required": True, "default": None, "doc": "First rank."},
    ],
}


def test_methods(peftctl, verbs):
    verbs.describe.result = [METHOD, METHOD | {"name": "ia3", "title": "(IA)3: gains."}]
    assert peftctl("methods").out == "lora  LoRA: low-rank updates.\nia3   (IA)3: gains.\n"
    assert peftctl("methods", "--json").json() == verbs.describe.result
    assert verbs.describe.calls == [((None,), {}), ((None,), {})]


def test_one_method(peftctl, verbs):
    verbs.describe.result = METHOD
    assert peftctl("methods", "lora").out == (
        "lora\n\nLoRA: low-rank updates.\n\ny = W x + s B A x\n\n"
        "learning rate  2e-4, where the recipe gives none\nin HF PEFT     LORA\n\n"
        "fields:\n\n"
        "  r: 16  (whole number)\n    Rank of the update.\n\n"
        "  bias: none  (one of none, all)\n    Biases trained.\n\n"
        "  init_r:  (whole number, required)\n    First rank.\n"
    )
    assert verbs.describe.calls == [(("lora",), {})]


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A folder of recipes in place of the one that comes along, and another one to work in."""
    from peftctl import bundled as module

    recipes, here = tmp_path / "recipes", tmp_path / "here"
    (recipes / "data").mkdir(parents=True)
    here.mkdir()
    (recipes / "tiny.yaml").write_text("# Learns little.\ndataset: {train: data/rows.jsonl}\n")
    (recipes / "data/rows.jsonl").write_text("{}\n")
    monkeypatch.setattr(module, "FOLDER", recipes)
    monkeypatch.chdir(here)
    return here


def test_recipes(peftctl, bundled):
    assert peftctl("recipes").out == "tiny  Learns little.\n"
    assert peftctl("recipes", "show", "tiny").out == "# Learns little.\ndataset: {train: data/rows.jsonl}\n"


def test_recipes_copy(peftctl, bundled):
    assert peftctl("recipes", "copy", "tiny").out == "tiny.yaml\n"
    assert (bundled / "tiny.yaml").read_text().startswith("# Learns little.")
    assert peftctl("recipes", "copy", "tiny", "--to", "new/mine.yaml").out == "new/mine.yaml\n"
    assert (bundled / "new/mine.yaml").is_file()

    again = peftctl("recipes", "copy", "tiny")
    assert (again.code, again.out) == (1, "")
    assert again.err.startswith("error: tiny.yaml: exists already\n  hint: ")


def test_recipes_copy_where_nothing_can_be_written(peftctl, bundled):
    (bundled / "file").write_text("")
    session = peftctl("recipes", "copy", "tiny", "--to", "file/mine.yaml")
    assert session.code == 1
    assert session.err.startswith("error: file")


def test_a_recipe_that_does_not_exist(peftctl, bundled):
    session = peftctl("recipes", "show", "tinny")
    assert session.code == 1
    assert session.err.endswith("hint: did you mean `tiny`?\n")
