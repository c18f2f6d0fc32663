"""What `peftctl tasks` knows: every task with what it trains, its fields and its metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_chat

from peftctl import recipe as recipes
from peftctl.config.write import to_yaml
from peftctl.errors import RecipeError
from peftctl.evaluation.metrics import METRICS
from peftctl.tasks import TASKS
from peftctl.tasks.dpo import DPO
from peftctl.tasks.task import plain, read
from peftctl.verbs.tasks import describe


@pytest.mark.parametrize("name", TASKS)
def test_a_page_says_what_a_user_asks(name: str):
    task = describe(name)
    assert task["title"]
    assert "loss" in task["page"]
    assert task["model"].startswith(("causal", "model", "pipeline", "text"))
    assert {METRICS[metric].needs for metric in task["metrics"]} <= TASKS[name]().judged.measures
    assert all(field["doc"] for field in task["fields"])


@pytest.mark.parametrize("name", TASKS)
def test_what_is_written_reads_back(name: str):
    assert read(plain(read(name))) == read(name)
    assert read({"type": name}) == read(name)


def test_all_of_them_are_listed_and_unknown_ones_told():
    assert [task["name"] for task in describe()] == sorted(TASKS)
    with pytest.raises(RecipeError, match="dpq: no such task; did you mean `dpo`"):
        describe("dpq")


@pytest.mark.parametrize("name", [name for name, cls in TASKS.items() if not cls.talks])
def test_what_is_about_conversations_means_nothing_to_others(name: str):
    recipe = tiny_chat.recipe(Path("base"), Path("rows.jsonl"), trainer={"task": name})
    recipes.coerce(recipe)
    for key, value in {"system": "Be brief.", "train_on": "last", "chat_template": "chatml"}.items():
        with pytest.raises(RecipeError, match=f"dataset.{key}: means nothing to `{name}`"):
            recipes.coerce({**recipe, "dataset": {**recipe["dataset"], key: value}})


def test_overrides_set_fields_of_a_task_that_is_a_name(tmp_path: Path):
    written = to_yaml(tiny_chat.recipe(Path("base"), Path("rows.jsonl"), trainer={"task": "dpo"}))
    (tmp_path / "recipe.yaml").write_text(written)
    for overrides in (["trainer.task.beta=0.3"], ["trainer.task=dpo", "trainer.task.beta=0.3"]):
        assert recipes.read(tmp_path / "recipe.yaml", overrides).trainer.task == DPO(beta=0.3)
    assert (
        recipes.read(tmp_path / "recipe.yaml", ["trainer.task=kto", "trainer.task.beta=0.3"]).trainer.task.beta == 0.3
    )
    with pytest.raises(RecipeError, match=r"trainer\.task\.betta: unknown key"):
        recipes.read(tmp_path / "recipe.yaml", ["trainer.task.betta=0.3"])
