"""`peftctl init`: the published rules as figures, and recipes that read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_chat

from peftctl import recipe as recipes
from peftctl.errors import RecipeError
from peftctl.tasks.task import name_of
from peftctl.verbs import advice
from peftctl.verbs.advice import Known
from peftctl.verbs.init import init, parameters

SEVEN, SEVENTY = 7_000_000_000, 70_000_000_000


@pytest.mark.parametrize(
    ("task", "rows", "size", "r", "alpha", "dropout"),
    [
        ("classification", None, SEVEN, 8, 16, 0.1),
        ("chat", None, SEVEN, 16, 32, 0.05),
        ("translation", None, SEVEN, 32, 64, 0.1),
        ("summarisation", None, SEVEN, 16, 32, 0.1),
        ("code", None, SEVEN, 32, 64, 0.05),
        ("translation", 500, SEVEN, 8, 16, 0.1),
        ("classification", 500, SEVEN, 8, 16, 0.1),
        ("translation", 5_000, SEVEN, 16, 32, 0.1),
        ("classification", 50_000, SEVEN, 16, 32, 0.1),
        ("translation", 50_000, SEVEN, 32, 64, 0.1),
        ("chat", 500_000, SEVEN, 64, 128, 0.05),
        ("chat", 5_000, SEVENTY, 32, 64, 0.05),
        ("classification", None, SEVENTY, 16, 32, 0.05),
    ],
)
def test_rank_alpha_and_dropout(task, rows, size, r, alpha, dropout):
    known = Known(task=task, rows=rows, parameters=size)
    found = advice.rank(known), advice.alpha(known), advice.dropout(known)
    assert tuple(setting.value for setting in found) == (r, alpha, dropout)
    assert all(setting.why for setting in found)


@pytest.mark.parametrize(("preset", "r", "dropout"), [("conservative", 8, 0.1), ("aggressive", 64, 0.05)])
def test_a_preset_wins_over_rows_and_task(preset, r, dropout):
    known = Known(task="code", rows=100, parameters=SEVEN, preset=preset)
    assert (advice.rank(known).value, advice.alpha(known).value, advice.dropout(known).value) == (r, 2 * r, dropout)


def test_what_is_adapted():
    names = ["q_proj", "v_proj"]
    for task, preset, wanted in [
        ("chat", "balanced", "attention"),
        ("code", "balanced", "all-linear"),
        ("chat", "aggressive", "all-linear"),
        ("chat", "conservative", names),
    ]:
        assert advice.targets(Known(task=task, preset=preset, query_and_value=names)).value == wanted
    assert advice.targets(Known(task="chat", preset="conservative")).value == "attention"


@pytest.mark.parametrize(("size", "rate"), [(135_000_000, "4e-4"), (SEVEN, "2e-4"), (SEVENTY, "1e-4"), (None, "2e-4")])
def test_the_learning_rate_falls_with_size(size, rate):
    assert advice.learning_rate(Known(task="chat", parameters=size)).value == rate


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6),
        ("mistralai/Mixtral-8x7B-v0.1", 56e9),
        ("Qwen/Qwen2.5-0.5B", 0.5e9),
        ("openai-community/gpt2", 124e6),
        ("a/b128k-model", None),
    ],
)
def test_the_size_in_a_name(name, size):
    assert parameters(name) == (size and pytest.approx(size, rel=0.2))


@pytest.mark.parametrize("task", [*advice.TASKS])
@pytest.mark.parametrize("method", [None, "lora", "dora", "ia3", "prefix", "full", "layers"])
def test_every_recipe_reads_back(tmp_path: Path, task: str, method: str | None):
    refused = {
        ("preferences", "full"): "`dpo` is compared with the base while it trains",
        ("captioning", "prefix"): "`captioning` trains a model that reads pictures beside tokens",
    }
    if (task, method) in refused:
        with pytest.raises(RecipeError, match=refused[(task, str(method))]):
            init(tmp_path / "my.yaml", model="a/b-7B", data="rows.jsonl", task=task, method=method)
        return
    path = init(tmp_path / "my.yaml", model="a/b-7B", data="rows.jsonl", task=task, method=method)
    recipe = recipes.read(path)
    assert recipe.output == "runs/my"
    if method == "lora":
        assert (recipe.method.r, recipe.method.alpha) == (advice.TASKS[task].r, 2 * advice.TASKS[task].r)


def test_rows_and_model_at_hand_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_chat.write_base(Path("base"))
    tiny_chat.write_rows(Path("rows.jsonl"), tiny_chat.chats(30))
    with open("rows.jsonl", "a") as file:
        file.write("{broken\n")
    heard: list[dict] = []
    path = init(Path("sub/my.yaml"), model=str(model), data="rows.jsonl", preset="conservative", listen=heard.append)
    text = path.read_text()
    assert "30 rows" in text
    assert "target_modules: [q_proj, v_proj]" in text
    assert "type: lora " in text, "small enough to stay in 16 bits"
    assert "1 of 31 rows cannot be read" in heard[0]["text"]
    assert recipes.read(path).dataset.train == "rows.jsonl", "found from the recipe's own folder"


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"task": "chta"}, "did you mean `chat`"),
        ({"preset": "agressive"}, "did you mean `aggressive`"),
        ({"method": "lorra"}, "did you mean `lora`"),
        ({"method": "fusion"}, "peftctl recipes copy methods/fusion"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, change: dict, hint: str):
    with pytest.raises(RecipeError, match=hint):
        init(tmp_path / "my.yaml", **{"model": "a/b", "data": "x.jsonl", **change})
    assert not (tmp_path / "my.yaml").exists()


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "my.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        init(tmp_path / "my.yaml", model="a/b", data="x.jsonl")
    assert (tmp_path / "my.yaml").read_text() == "mine"


def test_the_page_says_what_the_code_does():
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
    for task in advice.TASKS.values():
        assert f"| {task.r} | {2 * task.r} | {task.dropout} |" in page
    for _, low, high in advice.RANKS:
        assert f"{low} to {high}" in page


@pytest.mark.parametrize(
    ("model", "task", "trained_as"),
    [
        ("google/flan-t5-base", "translation", "seq2seq"),
        ("facebook/bart-base", "summarisation", "seq2seq"),
        ("google/flan-t5-base", "classification", "seq2seq"),
        ("google-bert/bert-base-uncased", "classification", "classification"),
        ("Salesforce/blip-image-captioning-base", "captioning", "captioning"),
        ("meta-llama/Llama-3.1-8B-Instruct", "preferences", "dpo"),
        ("meta-llama/Llama-3.1-8B-Instruct", "classification", "sft"),
        ("somebody/unheard-of", "translation", "sft"),
    ],
)
def test_the_kind_of_model_decides_about_the_task(model, task, trained_as, tmp_path):
    made = init(tmp_path / "recipe.yaml", model=model, data="rows.jsonl", task=task)
    assert name_of(recipes.read(made).trainer.task) == trained_as
