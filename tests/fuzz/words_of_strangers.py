"""Recipes, overrides and command lines."""

from __future__ import annotations

import contextlib
import io
import json
import os
from copy import deepcopy
from pathlib import Path
from random import Random

import yaml
from fuzz import corpora
from fuzz.mutations import Case, Mutator, changed
from fuzz.nasty import INTEGERS, TEXTS
from fuzz.target import Target

from peftctl.cli import answer
from peftctl.cli.console import OBEYED
from peftctl.config import document
from peftctl.recipe import build
from peftctl.recipe import read as read_recipe


def recipe(folder: Path) -> Target:
    """A recipe as `peftctl validate` reads it."""
    corpus = corpora.recipes()
    parsed = [yaml.safe_load(case["recipe.yaml"]) for case in corpus]
    path = folder / "recipe.yaml"

    def check(case: Case) -> None:
        path.write_bytes(case["recipe.yaml"])
        read_recipe(path)

    def values(random: Random, case: Case) -> None:
        value = deepcopy(random.choice(parsed))
        for _ in range(random.choice((1, 1, 2, 3))):
            value = changed(random, value)
        with contextlib.suppress(ValueError, RecursionError, yaml.YAMLError):
            text = json.dumps(value, ensure_ascii=False) if random.random() < 0.7 else yaml.safe_dump(value)
            case["recipe.yaml"] = text.encode("utf-8", "surrogatepass")

    return Target(Mutator(corpus, [values]), check)


def override(folder: Path) -> Target:
    """`a.b=c`, on a recipe that is right."""
    whole = document.parse(corpora.recipes()[-1]["recipe.yaml"].decode(), "recipe.yaml")
    keys = "model.dtype method.r method.type method.target_modules dataset.train dataset.train.0 dataset.eval.one.path"
    keys += " trainer.task trainer.task.beta trainer.steps eval.gates.loss.max eval.metrics export output seed x.y a"
    values = ["1", "-1", "1e-4", "null", "[a, b]", "{type: lora}", "{a: 1", "&a 1", "*a", "'x", "true", "sft", "a: b"]
    corpus = [{"override": f"{key}={value}".encode()} for key in keys.split() for value in values]

    def check(case: Case) -> None:
        text = case["override"].replace(b"\0", b"").decode("utf-8", "surrogateescape")  # as a command line has it
        build(whole, folder, [text])

    def nasty(random: Random, case: Case) -> None:
        put = random.choice((random.choice(TEXTS), str(random.choice(INTEGERS)), ".", "=", " ", "0", "-1"))
        words = case["override"].decode("utf-8", "replace").partition("=")
        at = random.randrange(3)
        joined = "".join(put if i == at and random.random() < 0.7 else w for i, w in enumerate(words))
        case["override"] = joined.encode("utf-8", "surrogatepass")

    return Target(Mutator(corpus, [nasty]), check)


def words(folder: Path) -> Target:
    """Command lines that read, in a folder where nothing must appear."""
    here = folder / "here"
    corpora.adapters(here)
    (here / "good.yaml").write_bytes(corpora.recipes()[-1]["recipe.yaml"])
    listing = sorted(os.listdir(here))
    lines = (
        "validate good.yaml|validate good.yaml seed=1 --json|schema|methods|methods lora|tasks|tasks dpo|recipes"
        "|recipes show smollm2-lora|adapters inspect 0|adapters inspect 0 --json|adapters diff 0 1|--version|--help|-h"
        "|validate|methods nothing|adapters|adapters inspect nowhere|train --help|merge --nonsense|nonsense"
    )
    corpus = [{"words": line.replace(" ", "\n").encode()} for line in lines.split("|")]
    safe = {"validate", "schema", "methods", "tasks", "recipes show", "adapters inspect", "adapters diff"}

    def check(case: Case) -> None:
        line = case["words"].replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
        verb = next((i for i, word in enumerate(line) if not word.startswith("-")), len(line))
        if verb < len(line) and line[verb] not in safe and " ".join(line[verb : verb + 2]) not in safe:
            line = [*line[:verb], "--help"] if "--" not in line[:verb] else ["--help"]
        before = os.getcwd()
        os.chdir(here)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
                answer(line)
        finally:
            os.chdir(before)
        assert sorted(os.listdir(here)) == listing, "a file was written"
        found = OBEYED.search(printed.getvalue())
        assert found is None, f"a terminal would obey {found!r}"

    def another(random: Random, case: Case) -> None:
        said = case["words"].split(b"\n")
        put = random.choice(("--json", "--", "-", "--help", "-x", "--a=b", "a=b", "seed=1", "0", *TEXTS))
        said.insert(random.randrange(len(said) + 1), put.encode("utf-8", "surrogatepass"))
        case["words"] = b"\n".join(said)

    return Target(Mutator(corpus, [another]), check)
