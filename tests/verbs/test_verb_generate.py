"""`peftctl generate`: the text that plain transformers and peft give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny_chat

import peftctl
from peftctl.verbs.generate import generate

QUESTION = "is it b?"


def answer(model: Any, ids: Any, **how: Any) -> str:
    tokenizer = tiny_chat.tokenizer()
    how = {"do_sample": False, "max_new_tokens": 12, **how}
    out = model.generate(**ids, pad_token_id=0, **how)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def asked(text: str) -> Any:
    chat = [{"role": "user", "content": text}]
    return tiny_chat.tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")


@pytest.fixture
def adapted(finished: Path, base: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny_chat.plain(base), finished / "adapter").eval()


def test_greedy_beams_and_base(finished: Path, base: Path, adapted: Any):
    expected = answer(adapted, asked(QUESTION))
    assert generate(str(finished), QUESTION, max_new_tokens=12) == expected
    assert generate(str(finished / "adapter"), QUESTION, max_new_tokens=12) == expected
    alone = answer(tiny_chat.plain(base), asked(QUESTION))
    assert generate(str(finished), QUESTION, max_new_tokens=12, base=True) == alone != expected
    beams = answer(adapted, asked(QUESTION), num_beams=4)
    assert generate(str(finished), QUESTION, max_new_tokens=12, beams=4) == beams


def test_sampling_follows_its_seed(finished: Path):
    said = {
        seed: generate(str(finished), QUESTION, sample=True, temperature=5.0, top_p=1, seed=seed) for seed in (1, 2)
    }
    assert said[1] != said[2]
    again = generate(str(finished), QUESTION, sample=True, temperature=5.0, top_p=1, seed=1)
    assert again == said[1]


def test_from_another_folder_on_the_command_line(
    finished: Path, cli: Callable[..., SimpleNamespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapted: Any
):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(finished, tmp_path / "moved")
    result = cli("generate", "moved", QUESTION, "--max-new-tokens", 12)
    assert (result.code, result.out) == (0, answer(adapted, asked(QUESTION)) + "\n")
    (copy / "recipe.yaml").unlink()  # an adapter folder on its own names its base
    alone = cli("generate", "moved/adapter", QUESTION, "--max-new-tokens", 6).out  # in bfloat16: nobody says otherwise
    assert result.out.startswith(alone.rstrip("\n"))


def test_a_run_of_pairs_goes_on_from_the_text(made: Callable[..., Any], base: Path, tmp_path: Path):
    from peft import PeftModel

    rows = [{"prompt": f"{chr(97 + i)} -> ", "completion": chr(98 + i)} for i in range(9)]
    data = tiny_chat.write_rows(tmp_path / "pairs.jsonl", rows)
    wanted = made(dataset={"train": str(data)})
    del wanted["dataset"]["eval"]
    peftctl.train(wanted, output=tmp_path / "run")
    assert not (tmp_path / "run" / "adapter" / "chat_template.jinja").exists()
    model = PeftModel.from_pretrained(tiny_chat.plain(base), tmp_path / "run" / "adapter").eval()
    ids = tiny_chat.tokenizer()("c -> ", return_tensors="pt")
    expected = answer(model, {key: ids[key] for key in ("input_ids", "attention_mask")})
    assert generate(str(tmp_path / "run"), "c -> ", max_new_tokens=12) == expected


def test_the_template_of_the_run_is_used(made: Callable[..., Any], base: Path, tmp_path: Path):
    template = tmp_path / "shout.jinja"
    template.write_text(tiny_chat.TEMPLATE.replace("':'", "'!!'").replace("a:'", "a!!'"))
    peftctl.train(made(dataset={"chat_template": str(template)}, trainer={"steps": 2}), output=tmp_path / "run")
    template.unlink()  # the run folder alone is enough
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny_chat.plain(base), tmp_path / "run" / "adapter").eval()
    text = f"<bos>u!!{QUESTION}<eos><bos>a!!"
    ids = tiny_chat.tokenizer()(text, add_special_tokens=False, return_tensors="pt")
    expected = answer(model, {key: ids[key] for key in ("input_ids", "attention_mask")})
    assert generate(str(tmp_path / "run"), QUESTION, max_new_tokens=12) == expected


def test_an_adapter_on_the_hub(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any], adapted: Any
):
    snapshot = tmp_path / "hub" / "models--somebody--adapter" / "snapshots" / ("a" * 40)
    shutil.copytree(finished / "adapter", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert generate("somebody/adapter", QUESTION, max_new_tokens=6) == answer(
        adapted, asked(QUESTION), max_new_tokens=6
    )
    wanted = made(method={"init_from": "somebody/adapter"}, trainer={"steps": 1})
    assert peftctl.train(wanted)["steps"] == 1
    assert "init_from: somebody/adapter" in (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(peftctl.PeftctlError, match=r"somebody/other: no such path here, the hub cannot be reached"):
        generate("somebody/other", QUESTION)
    with pytest.raises(peftctl.PeftctlError) as caught:
        generate("hub/other", QUESTION)  # `hub` is a folder here, so this was meant as a path
    assert "the hub" not in str(caught.value)


def test_another_base_of_the_same_shape_is_refused(made: Callable[..., Any], tmp_path: Path):
    base = tiny_chat.write_base(tmp_path / "base")
    peftctl.train(made(model={"name_or_path": str(base)}, trainer={"steps": 1}), output=tmp_path / "run")
    shutil.rmtree(base)
    tiny_chat.write_base(base, seed=5)
    with pytest.raises(peftctl.PeftctlError, match="not the base that") as caught:
        generate(str(tmp_path / "run"), QUESTION)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["base"]["name"] == str(base)
    assert caught.value.problems[0].hint == "its weights differ"


def test_the_system_message_of_the_run_is_used(finished: Path, tmp_path: Path, adapted: Any):
    import yaml

    copy = shutil.copytree(finished, tmp_path / "run")
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["dataset"]["system"] = "shout!"
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    chat = [{"role": "system", "content": "shout!"}, {"role": "user", "content": QUESTION}]
    ids = tiny_chat.tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    expected = answer(adapted, ids)
    assert generate(str(copy), QUESTION, max_new_tokens=12) == expected != answer(adapted, asked(QUESTION))
