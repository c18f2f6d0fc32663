"""Recipes of strangers: data and nothing else. Each ends in an error with line and column, at once."""

from __future__ import annotations

from typing import Any

import pytest
from hostile.attack import TOKEN, Attack

GOOD = """\
model: {name_or_path: base}
method: {type: lora}
dataset: {train: rows.jsonl}
output: run
"""

BOMB = "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 20))

TEXTS = {
    # PyYAML CVE-2017-18342, CVE-2019-20477, CVE-2020-1747, CVE-2020-14343; ms-swift CVE-2025-50460
    "a tag that calls": ("seed: !!python/object/apply:os.system [id]\n" + GOOD, r"recipe.yaml:1:7.*tags"),
    "a tag that builds": ("seed: !!python/object/new:canary_module.X {}\n" + GOOD, "tags"),
    "a tag that imports": ("seed: !!python/module:canary_module\n" + GOOD, "tags"),
    "a tag of a name": ("seed: !!python/name:os.system\n" + GOOD, "tags"),
    "a tag of our own": ("seed: !env HF_TOKEN\n" + GOOD, "tags"),
    "a binary": ("seed: !!binary aGVsbG8=\n" + GOOD, "tags"),
    "a time": ("seed: !!timestamp 2020-01-01\n" + GOOD, "tags"),
    "a set": ("seed: !!set {a, b}\n" + GOOD, "tags"),
    # 396 bytes of which the walk is 387 million leaves
    "a bomb of aliases": (BOMB, "aliases stand for more than 64"),
    "an alias of itself": ("seed: &a [*a]\n" + GOOD, "refers to itself"),
    "an alias of nothing": ("seed: *nowhere\n" + GOOD, "refers to nothing"),
    "a merge of aliases": ("x: &x {<<: {a: 1}}\n" + GOOD, "recipe.yaml:1"),
    "a hundred thousand brackets": ("seed: " + "[" * 100_000, "nested deeper than 16"),
    "braces": ("seed: " + "{a: " * 50_000, "nested deeper than 16"),
    "dashes": ("seed:\n  " + "- " * 50_000, "nested deeper than 16"),
    "many values": ("seed: [" + "1," * 20_000 + "]\n" + GOOD, "more than 5000 keys and values"),
    "a file of megabytes": ("# " + "x" * (1 << 20) + "\n" + GOOD, "256 KB or larger"),
    "a key twice": (GOOD + "output: other\n", "output: given twice"),
    "a block twice": (GOOD + "model: {name_or_path: evil}\n", "model: given twice"),
    "two documents": (GOOD + "---\n" + GOOD, "a second document"),
    "a key that is a list": ("? [a, b]\n: 1\n" + GOOD, "a key that is no text"),
    "not a number": (GOOD + "trainer: {learning_rate: .nan}\n", "no finite number"),
    "infinity": (GOOD + "trainer: {learning_rate: .inf}\n", "no finite number"),
    "beyond all numbers": (GOOD + "trainer: {learning_rate: 1e999}\n", "expected a number; got `1e999`"),
    "a number of ten thousand digits": (GOOD + f"seed: {'9' * 10_000}\n", "recipe.yaml:5:7"),
    "a number as text": (GOOD + "trainer: {steps: 'ten'}\n", "steps"),
    "a list for a number": (GOOD + "trainer: {steps: [1]}\n", "steps"),
    "steps of a lifetime": (GOOD + "trainer: {steps: -1}\n", "steps"),
    "an unknown key": (GOOD + "postprocess: rm -rf /\n", "postprocess: unknown key"),
    "an escape of the terminal": (GOOD + 'seed: "\\e]52;c;cm0gLXJm\\a\\e[2J"\n', "seed"),
    "an escape in a key": (GOOD + '"\\e]0;evil\\a": 1\n', "unknown key"),
    "raw control characters": (GOOD + "# \x1b[2J\n", "not allowed"),
    "a lone surrogate": (GOOD + 'seed: "\\ud800"\n', "not allowed"),
    "an escape out of range": (GOOD + 'seed: "\\UFFFFFFFF"\n', "not YAML"),
    "no text at all": (b"\xff\xfe\x00\x01\x80", "not UTF-8"),
    "NULs": (GOOD.encode() + b"\0" * 100, "not allowed"),
    "Hydra's target": (
        GOOD + "trainer: {_target_: os.system, args: [id]}\n",
        "_target_.*unknown key",
    ),  # CVE-2025-23304
    "a template of Jinja": (GOOD + "seed: '{{ cycler.__init__.__globals__.os.popen(1) }}'\n", "seed"),
    "another recipe to extend": (GOOD + "extends: ../../../etc/passwd\n", "extends: unknown key"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_recipe_is_refused(name: str, attack: Attack):
    text, telling = TEXTS[name]
    attack.write("recipe.yaml", text)
    attack.refused("validate", "recipe.yaml", telling=telling, within=1.0, swelling=60)


FORBIDDEN: dict[str, tuple[str, Any]] = {
    # CVE-2026-4372, CVE-2026-86169: no key of a recipe turns foreign code, pickles or uploads on
    "model.trust_remote_code": ("model", True),
    "model.use_safetensors": ("model", False),
    "model.allow_pickle": ("model", True),
    "model.weights_only": ("model", False),
    "model.auto_map": ("model", {"AutoModel": "evil.Model"}),
    "model.custom_pipeline": ("model", "evil/pipeline"),
    "model.token": ("model", "${HF_TOKEN}"),
    "dataset.trust_remote_code": ("dataset", True),
    "dataset.script": ("dataset", "evil.py"),
    "trainer.push_to_hub": ("trainer", True),
    "trainer.report_to": ("trainer", "wandb"),
    "trainer.callbacks": ("trainer", ["evil.Callback"]),
    "trainer.hub_token": ("trainer", "x"),
    "export.upload": ("export", "evil/repo"),
    "export.push": ("export", True),
    "eval.command": ("eval", "curl evil"),
}


@pytest.mark.parametrize("key", FORBIDDEN)
def test_no_key_turns_danger_on(key: str, attack: Attack):
    block, value = FORBIDDEN[key]
    attack.recipe(**{block: {key.split(".")[1]: value}})
    attack.refused("validate", "recipe.yaml", telling=rf"recipe.yaml:\d+:\d+: {key}: unknown key")
    attack.recipe()
    attack.refused("validate", "recipe.yaml", f"{key}=true", telling=rf"override `{key}=true`.*: unknown key")


@pytest.mark.parametrize("output", ["../../x", "/tmp/x", "~/x", "a/../../x", "", ".", "run/../../outside/x"])
def test_output_stays_below_the_working_directory(output: str, attack: Attack):
    attack.recipe(output=output)
    attack.refused("train", "recipe.yaml", telling=r"output.*does not lie below the working directory")
    attack.recipe()
    attack.refused("train", "recipe.yaml", f"output={output}", telling="output")


def test_a_token_is_never_filled_in(attack: Attack):
    attack.recipe(dataset={"train": "${HF_TOKEN}.jsonl"}, output="run-$HF_TOKEN")
    attack.refused("data", "recipe.yaml", telling=r"\$\{HF_TOKEN\}\.jsonl: no such file")
    attack.recipe(output="run-${HF_TOKEN}", trainer={"steps": 1, "fast": "off"})
    attack.harmless("train", "recipe.yaml", writes=["run-${HF_TOKEN}"], within=20, swelling=600)
    assert (attack.work / "run-${HF_TOKEN}" / "recipe.yaml").is_file()
    assert TOKEN not in (attack.work / "run-${HF_TOKEN}" / "provenance.json").read_text()


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["seed=!!python/object/apply:os.system [id]"], "tags"),
        (["seed=" + "[" * 10_000], "nested deeper"),
        (["a.b.c.d=" + "x" * 100_000], "a.b.c.d|unknown key"),
        ([".".join("a" * 5_000) + "=1"], "nested deeper|unknown key"),
        (["\x1b]52;c;eA==\x07=1"], "override"),
        (["dataset.999999999999=1"], "dataset"),
        (["=1"], "override"),
    ],
)
def test_an_override_is_refused(words: list[str], telling: str, attack: Attack):
    attack.recipe()
    attack.refused("train", "recipe.yaml", *words, telling=telling, within=1.0)


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "link to itself", "pipe"])
def test_a_recipe_that_is_no_file(kind: str, attack: Attack):
    path = attack.work / "recipe.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        path.symlink_to("/dev/zero")  # never ends
    else:
        path.symlink_to("nothing" if kind == "link to nothing" else "recipe.yaml")
    attack.refused("validate", "recipe.yaml", telling="recipe.yaml", within=1.0)


@pytest.mark.slow
def test_a_pattern_of_a_recipe_is_bounded(attack: Attack):
    # 25 characters of an adapter_config.json hang HF PEFT; a recipe in a pull request is no less a stranger's
    attack.recipe(method={"target_modules": r"(.*.*.*.*.*.*)*x"})
    attack.refused("train", "recipe.yaml", telling="target_modules", within=5.0)
