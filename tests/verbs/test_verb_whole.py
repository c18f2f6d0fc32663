"""Weights trained whole, in place or beside the base, through every verb: train, resume, eval, generate, merge."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_chat
import torch
from safetensors.torch import load_file

import peftctl
from peftctl.engine.peft_config import PEFT_TYPES
from peftctl.errors import AdapterError, RecipeError
from peftctl.exports.merge import merge as merge_folder
from peftctl.training.journal import Journal
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.export import export
from peftctl.verbs.generate import generate
from peftctl.verbs.merge import merge
from peftctl.verbs.mortal import one_thread

METHODS = {"full": {"type": "full"}, "layers": {"type": "layers", "top": 1, "norms": True}}
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16 whose output head is its embedding."""
    torch.manual_seed(0)
    model = tiny.llama(tied=True).eval()
    tiny.stir(model)
    folder = tmp_path_factory.mktemp("tied") / "tiny-llama"
    model.bfloat16().save_pretrained(folder)
    tiny_chat.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=METHODS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tied: Path, data: Path
) -> tuple[dict[str, Any], Path]:
    """A recipe and its finished run."""
    files = data / "train.jsonl", data / "held-out.jsonl"
    recipe = tiny_chat.recipe(tied, *files, eval={"labels": tiny_chat.LABELS})
    recipe["method"] = METHODS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "run"
    with one_thread():
        peftctl.train(recipe, output=folder)
    return recipe, folder


def test_stopped_and_resumed_is_never_stopped(
    trained: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def write(self: Journal, event: Any) -> None:
        if event["event"] == "step" and event["step"] == 6:
            raise Killed
        real(self, event)

    recipe, finished = trained
    real = Journal.write
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", write)
        with pytest.raises(Killed):
            peftctl.train(recipe, output=tmp_path / "run")
    assert not (tmp_path / "run" / ADAPTER).exists()
    peftctl.train(recipe, output=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
    losses = [event["loss"] for event in tiny_chat.steps(tmp_path / "run")]
    assert losses == [event["loss"] for event in tiny_chat.steps(finished)]
    assert losses[-1] < losses[0]


def test_eval_measures_the_base_as_it_was(trained: tuple[dict[str, Any], Path], tied: Path):
    recipe, finished = trained
    figures = evaluate(str(finished))["figures"]
    assert figures["adapter"]["loss"] < figures["base"]["loss"]
    best = min(event["loss"] for event in tiny_chat.journal(finished) if event["event"] == "eval")
    assert figures["adapter"]["loss"] == pytest.approx(best, rel=1e-5)
    assert figures["base"]["loss"] == pytest.approx(loss_of(tiny_chat.plain(tied), recipe), rel=1e-5)


def loss_of(model: Any, recipe: dict[str, Any]) -> float:
    """On the held-out rows, one by one."""
    tokenizer = tiny_chat.tokenizer()
    total, count = 0.0, 0
    for line in Path(recipe["dataset"]["eval"]).read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
        answer = tokenizer(assistant["content"] + "<eos>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        total -= sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        count += len(answer)
    return total / count


def test_generate_speaks_as_either(trained: tuple[dict[str, Any], Path], tied: Path):
    _, finished = trained
    question = "is it is it k!?"
    adapted = generate(str(finished), question, max_new_tokens=12)
    assert adapted != generate(str(finished), question, max_new_tokens=12, base=True)
    assert adapted == said(peftctl.load(tiny_chat.plain(tied), finished / "adapter"), question)
    assert generate(str(finished), question, max_new_tokens=12, base=True) == said(tiny_chat.plain(tied), question)


def said(model: Any, question: str) -> str:
    tokenizer = tiny_chat.tokenizer()
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_merged_weights_are_the_trained_ones(trained: tuple[dict[str, Any], Path], tied: Path, tmp_path: Path):
    _, finished = trained
    report = merge(str(finished), tmp_path / "merged")
    tensors = {key.removeprefix("base_model.model."): t for key, t in load_file(finished / ADAPTER).items()}
    base, merged = (load_file(folder / "model.safetensors") for folder in (tied, tmp_path / "merged"))
    assert base.keys() == merged.keys()  # the head and the embedding are one weight still
    for key, value in merged.items():
        assert torch.equal(value, tensors[key].bfloat16() if key in tensors else base[key])
    assert set(report["tensors"]["changed"]) | set(report["tensors"]["adapted_but_unchanged"]) == tensors.keys()
    assert report["proof"]["difference"] <= report["proof"]["tolerance"]
    assert not report["untied_embeddings"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


def test_the_card_says_who_can_load_it(trained: tuple[dict[str, Any], Path], tied: Path, tmp_path: Path):
    assert {kind.value for kind in peft.PeftType} == PEFT_TYPES
    _, finished = trained
    for folder in (finished / "adapter", tmp_path / "alone"):
        if folder.parent == tmp_path:
            shutil.copytree(finished / "adapter", tmp_path / "elsewhere")
            export(str(tmp_path / "elsewhere"), folder)
        text = (folder / "README.md").read_text()
        assert "library_name: peftctl" in text
        assert "PeftModel" not in text
        [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        names: dict[str, Any] = {}
        here = code.replace("path/to/this/folder", str(folder)).replace('"tiny-llama"', f'"{tied}"')
        exec(here, names)
        assert tiny.greedy(names["model"])


def test_a_merge_that_does_not_fit_the_memory(trained: tuple[dict[str, Any], Path], tied: Path, tmp_path: Path):
    recipe, finished = trained
    if recipe["method"]["type"] == "full":
        with pytest.raises(AdapterError, match="does not run in parts"):
            merge_folder(tied, finished / "adapter", tmp_path / "merged", memory=0)
        assert not list(tmp_path.iterdir())
    else:
        report = merge_folder(tied, finished / "adapter", tmp_path / "merged", memory=0)
        assert report["proof"]["difference"] <= report["proof"]["tolerance"]


def test_a_run_goes_on_from_what_was_trained(trained: tuple[dict[str, Any], Path], tmp_path: Path):
    recipe, finished = trained
    if recipe["method"]["type"] == "full":
        pytest.skip("refused: it starts from weights")
    recipe = {**recipe, "method": {**recipe["method"], "init_from": str(finished / "adapter")}}
    said: list[dict[str, Any]] = []
    peftctl.train(recipe, output=tmp_path / "run", listen=said.append)
    assert not [event["text"] for event in said if event["event"] == "warning"]
    first, last = tiny_chat.steps(tmp_path / "run")[0], tiny_chat.steps(finished)[0]
    assert first["loss"] < last["loss"]


def test_an_adapter_that_does_not_fit_is_told_before_the_base_is_measured(
    trained: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, finished = trained
    other = peftctl.attach(tiny.build("gpt2"), peftctl.METHODS["lora"](r=2))
    peftctl.save(other, tmp_path / "other")
    monkeypatch.setattr("peftctl.verbs.evaluate.measure", None)
    with pytest.raises(AdapterError, match="is not part of this adapter"):
        evaluate(str(finished), adapter=str(tmp_path / "other"))


@pytest.mark.parametrize("block", [{"model": {"quantization": "nf4"}}, {"method": {"type": "full", "init_from": "x"}}])
def test_full_does_not_go_with_what_it_cannot_train(made: Callable[..., Any], block: dict[str, Any]):
    recipe = made(**{"model": {}, **block})
    recipe["method"] = block.get("method", {"type": "full"})
    with pytest.raises(RecipeError, match="does not go with `full`"):
        peftctl.train(recipe)
