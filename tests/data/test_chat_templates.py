from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftctl.data.encode import Encoder
from peftctl.data.formats import Chat
from peftctl.data.template import STOPS, find, render
from peftctl.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "It is."}
AGAIN = {"role": "user", "content": "Why?"}
BECAUSE = {"role": "assistant", "content": "Because."}
FAMILIES = ["chatml", "llama2", "llama3", "gemma"]

# What our templates write for the conversation above, `stop` being what ends a turn and `bos` what opens a text.
WRITTEN = {
    "chatml": "{bos}<|im_start|>system\nBe brief.{stop}\n<|im_start|>user\nWhat is it?{stop}\n<|im_start|>assistant\n"
    "It is.{stop}\n<|im_start|>user\nWhy?{stop}\n<|im_start|>assistant\nBecause.{stop}\n",
    "llama2": "{bos}[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is it? [/INST] It is. {stop}{bos}[INST] Why? [/INST] "
    "Because. {stop}",
    "llama3": "{bos}<|start_header_id|>system<|end_header_id|>\n\nBe brief.{stop}<|start_header_id|>user"
    "<|end_header_id|>\n\nWhat is it?{stop}<|start_header_id|>assistant<|end_header_id|>\n\nIt is.{stop}"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?{stop}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "Because.{stop}",
    "mistral": "{bos}[INST] Be brief.\n\nWhat is it? [/INST] It is.{stop}[INST] Why? [/INST] Because.{stop}",
    "gemma": "{bos}<start_of_turn>user\nBe brief.\n\nWhat is it?{stop}\n<start_of_turn>model\nIt is.{stop}\n"
    "<start_of_turn>user\nWhy?{stop}\n<start_of_turn>model\nBecause.{stop}\n",
    "zephyr": "{bos}<|system|>\nBe brief.{stop}\n<|user|>\nWhat is it?{stop}\n<|assistant|>\nIt is.{stop}\n"
    "<|user|>\nWhy?{stop}\n<|assistant|>\nBecause.{stop}\n",
    "alpaca": "{bos}Be brief.\n\n### Instruction:\nWhat is it?\n\n### Response:\nIt is.{stop}\n\n"
    "### Instruction:\nWhy?\n\n### Response:\nBecause.{stop}\n\n",
    "plain": "{bos}Be brief.\n\nUser: What is it?\nAssistant: It is.{stop}\nUser: Why?\nAssistant: Because.{stop}\n",
}


def said_by(name: str, tokenizer: Any, root: Path = Path()) -> tuple[str, list[str]]:
    said: list[str] = []
    return find(name, tokenizer, root, said.append), said


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STOPS)
def test_ours_write_what_they_should_on_any_tokenizer(
    name: str, family: str, tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_of(family)
    text, said = said_by(name, tokenizer)
    own_stop = STOPS[name] in tokenizer.get_vocab()
    stop = STOPS[name] if own_stop else tokenizer.eos_token
    bos = "<s>" if family == "llama2" else ""
    messages = [SYSTEM, USER, ANSWER, AGAIN, BECAUSE]
    assert render(messages, tokenizer, text, "x") == WRITTEN[name].format(bos=bos, stop=stop)
    assert bool(said) == (STOPS[name] is not None and not own_stop)

    encoder = Encoder(tokenizer, text, 2048, "truncate")
    row = encoder.whole(Chat("rows.jsonl:1", messages))
    assert row.input_ids == tokenizer.apply_chat_template(messages, chat_template=text)["input_ids"]
    space = " " if name == "llama2" else ""
    answers = [tokenizer.decode(row.ids[start:end]).lstrip() for start, end in row.spans]
    assert answers == [f"It is.{space}{stop}", f"Because.{space}{stop}"]
    assert encoder.stop_ids == {tokenizer.convert_tokens_to_ids(stop)}


@pytest.mark.parametrize("name", STOPS)
def test_ours_open_the_answer_that_they_write(name: str, tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("llama2")
    text, _ = said_by(name, tokenizer)
    prompt = render([USER], tokenizer, text, "x", add_generation_prompt=True)
    assert render([USER, ANSWER], tokenizer, text, "x").startswith(prompt)


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
@pytest.mark.parametrize("messages", [[USER, ANSWER, SYSTEM, ANSWER], [SYSTEM, ANSWER]])
def test_ours_lose_no_system_message(name: str, messages: list[Any], tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("llama2")
    text, _ = said_by(name, tokenizer)
    with pytest.raises(DataError, match=f"{name} takes a system message only") as caught:
        render(messages, tokenizer, text, "rows.jsonl:3")
    assert caught.value.problems[0].text.startswith("rows.jsonl:3: the chat template refuses this conversation")


def test_every_template_has_a_file_and_says_how_it_stops() -> None:
    import peftctl.data.template as module

    folder = Path(module.__file__).parent / "templates"
    assert {path.stem for path in folder.iterdir()} == set(STOPS) == set(WRITTEN)
    assert all(f"Stop token: {STOPS[p.stem] or 'eos_token'}" in p.read_text() for p in folder.iterdir())


def test_the_tokenizers_own(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("chatml")
    assert said_by("tokenizer", tokenizer) == (tokenizer.chat_template, [])


def test_a_tokenizer_without_one(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="this tokenizer has no chat template of its own") as caught:
        said_by("tokenizer", make_tokenizer(None, ["</s>"], eos_token="</s>"))
    hint = caught.value.problems[0].hint
    assert hint is not None
    assert all(name in hint for name in STOPS)


def test_a_tokenizer_with_several(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer({"default": "{{ 'd' }}", "rag": "{{ 'r' }}"}, ["</s>"], eos_token="</s>")
    assert said_by("tokenizer", tokenizer)[0] == "{{ 'd' }}"
    tokenizer.chat_template = {"rag": "{{ 'r' }}", "tools": "{{ 't' }}"}
    with pytest.raises(DataError, match=r"several \(`rag`, `tools`\) and none is its default"):
        said_by("tokenizer", tokenizer)


def test_a_file_below_the_root(tmp_path: Path, tokenizer_of: Callable[[str], Any]) -> None:
    (tmp_path / "mine.jinja").write_text("{{ 'é' }}", encoding="utf-8-sig")
    tokenizer = tokenizer_of("chatml")
    assert said_by("mine.jinja", tokenizer, tmp_path)[0] == "{{ 'é' }}"
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m }")
    (tmp_path / "fine.jinja").write_text("{% generation %}{% break %}{% endgeneration %}{{ x | tojson }}")
    said_by("fine.jinja", tokenizer, tmp_path)
    for name, what in {
        "min.jinja": "neither one of peftctl's templates nor a file: `min.jinja`; did you mean `mine.jinja`?",
        "chatlm": "neither one of peftctl's templates nor a file: `chatlm`; did you mean `chatml`?",
        ".": "cannot be read",
        "latin.jinja": "cannot be read",
        "bad.jinja": "dataset.chat_template:2: not a Jinja template",
    }.items():
        with pytest.raises(DataError) as caught:
            said_by(name, tokenizer, tmp_path)
        assert what in str(caught.value), name


def test_a_template_without_a_stop_token_for_it(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(None, ["<unk>"], unk_token="<unk>")
    with pytest.raises(
        DataError, match=r"`chatml` needs a token that ends a turn.*neither `<\|im_end\|>` nor an end token"
    ):
        said_by("chatml", tokenizer)


def test_todays_date_is_told(tmp_path: Path, tokenizer_of: Callable[[str], Any]) -> None:
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%Y') }}")
    assert "today's date" in said_by("dated.jinja", tokenizer_of("chatml"), tmp_path)[1][0]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ messages[9]['role'] }}", "has no element 9"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages + 'a' }}", "can only concatenate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('no\nway') }}", "refuses this conversation: no"),
    ],
)
def test_whatever_a_template_raises_is_a_data_error(
    template: str, what: str, tokenizer_of: Callable[[str], Any]
) -> None:
    with pytest.raises(DataError) as caught:
        render([USER, ANSWER], tokenizer_of("chatml"), template, "rows.jsonl:3")
    text, hint = caught.value.problems[0]
    assert text.startswith("rows.jsonl:3: ")
    assert what in text
    assert "\n" not in text
    assert hint


def test_a_refused_call_has_its_own_hint(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("chatml")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(DataError, match=r"refuses this conversation.*it may know no calls of tools"):
        render([USER, call], tokenizer, tokenizer.chat_template, "rows.jsonl:3")


def test_a_refused_system_message_has_its_own_hint(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("gemma")
    with pytest.raises(DataError, match="System role not supported; this template has no system messages"):
        render([SYSTEM, USER, ANSWER], tokenizer, tokenizer.chat_template, "rows.jsonl:3")
